"Four wings, and nothing in them that is too large to be read: README, The house"
import ast, json, re
import nbformat, pytest
from conftest import ROOT, python
from nbclient import NotebookClient

NUMBERED = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
CODE = [o for folder in ('sfv_lite','docs','tests','nbs/experiments') for o in sorted((ROOT/folder).glob('*.py'))]


def cells(notebook):
    "The sources of a notebook's code cells"
    return [''.join(o['source']) for o in json.loads(notebook.read_text())['cells'] if o['cell_type']=='code']


def imported(code):
    "Modules of the package that some code names, wherever it does"
    one = r'^\s*(?:with \w+\(\): )?from (?:\.|sfv_lite\.)(\w+) import'
    found = re.findall(one+r'|^\s*from sfv_lite import (.+)$', code, re.M)
    return {o.strip() for one,several in found for o in (several or one).split(',')}


MODULE = {o.name:re.search(r'#\| default_exp (\w+)', '\n'.join(cells(o)))[1] for o in NUMBERED}
ORDER = list(MODULE.values())
IDEA = [module for name,module in MODULE.items() if name<'10']


def test_there_are_four_wings():
    "Numbered by tens, and the first ends with the step"
    assert {o[0] for o in MODULE} == set('0123') and IDEA==['video','edm','svd','sampling','heads','objective','sfv']


@pytest.mark.parametrize('module', ORDER)
def test_imports_never_point_up(module):
    "A module uses those of earlier notebooks only, and those of the idea none of the other wings"
    uses = imported((ROOT/f'sfv_lite/{module}.py').read_text())
    assert uses <= set(ORDER[:ORDER.index(module)]) and (module not in IDEA or uses<=set(IDEA)), uses


@pytest.mark.parametrize('notebook', [o for o in NUMBERED if MODULE[o.name] in IDEA], ids=lambda o: o.stem)
def test_the_idea_needs_nothing_else(notebook):
    "A chapter's own cells may open the shipped weights, draw a table or a slider; all else comes from chapters"
    lines = [line for c in cells(notebook) for line in c.splitlines()]
    extra = {o for line in lines for o in imported(line)} - set(IDEA)
    assert extra <= {'pipelines','files','widgets'}, extra
    others = [re.sub(r'explore_\w+', 'explore_…', o) for o in lines if imported(o) & extra]
    assert set(others) <= {'from sfv_lite.pipelines import load_pipeline', 'from sfv_lite.files import table',
        'from sfv_lite.widgets import explore_…'}, others


@pytest.mark.parametrize('file', CODE, ids=lambda o: str(o.relative_to(ROOT)))
def test_lines_fit_on_a_screen(file):
    "120 characters; what nbdev writes by itself, `__all__` and its index, may be longer"
    text = '' if file.name=='_modidx.py' else re.sub(r'^__all__ = \[.*?\]$', '', file.read_text(), flags=re.M|re.S)
    long = [o for o in text.splitlines() if len(o)>120]
    assert not long


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda o: o.stem)
def test_cells_fit_on_a_screen(notebook):
    "120 characters in code; prose is wrapped by whoever shows it"
    long = [o for c in cells(notebook) for o in c.splitlines() if len(o)>120 and not o.startswith('#| fig-alt: ')]
    assert not long


def pictures(notebook):
    "Cells of a notebook that show a picture or a moving one"
    nb = json.loads(notebook.read_text())
    kinds = lambda c: {k.split('/')[0] for o in c.get('outputs',()) for k in o.get('data',())}
    return [''.join(c['source']) for c in nb['cells'] if 'image' in kinds(c)]


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda o: o.stem)
def test_pictures_have_words(notebook):
    "For those who do not see them: `#| fig-alt:` of a cell that draws, the text in brackets of a picture in prose"
    assert not [o for o in pictures(notebook) if not re.search(r'^#\| fig-alt: \w.{20,}', o, re.M)]
    assert '![](' not in notebook.read_text()


@pytest.mark.parametrize('module', ORDER)
def test_rooms_and_functions_are_small(module):
    "A room has about 350 lines, a function about 25, its signature and docstring not counted"
    text = (ROOT/f'sfv_lite/{module}.py').read_text()
    lengths = {o.name:o.body[-1].end_lineno-o.body[bool(ast.get_docstring(o)) and len(o.body)>1].lineno+1
        for o in ast.walk(ast.parse(text)) if isinstance(o,ast.FunctionDef)}
    assert len(text.splitlines())<=350 and max(lengths.values(), default=0)<=30, lengths


@pytest.mark.parametrize('how', [('-m','sfv_lite'), ('-m','sfv_lite.cli')], ids=' '.join)
def test_the_package_is_a_command(how):
    "As `accelerate launch -m sfv_lite.cli` calls it, too: what is wrong is said, and the exit code tells"
    done = python(*how, 'sample', 'nowhere.png')
    assert done.returncode==1 and done.stderr.strip()=='sfv-lite sample: error: nowhere.png: no such file'
    done = python(*how, '--version')
    assert done.returncode==0 and done.stdout.startswith('sfv-lite ')


SOLVED = [o for o in NUMBERED if o.name<'10']


@pytest.mark.slow
@pytest.mark.parametrize('notebook', [
    pytest.param(o, id=o.stem, marks=[pytest.mark.huge]*(o.name>'04')) for o in SOLVED]) # those of a minute and more
def test_solutions_run(notebook, tmp_path):
    "Each chapter of the idea has exercises; the code in their folded solutions runs after the chapter's own"
    nb = nbformat.read(notebook, 4)
    prose = '\n'.join(o.source for o in nb.cells if o.cell_type=='markdown')
    folded = re.findall(r'<details>.*?</details>', prose, re.S)
    code = [c for block in folded for c in re.findall(r'```python\n(.*?)```', block, re.S)]
    assert len(code)>=2
    nb.cells += [nbformat.v4.new_code_cell(o) for o in code]
    NotebookClient(nb, timeout=600, resources=dict(metadata=dict(path=str(notebook.parent)))).execute()
