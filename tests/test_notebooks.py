"""The notebooks are the source: they run, what was made from them is current, and what a reader sees in them is whole.
All on a copy"""
import fnmatch, json, os, re, shutil, sys, tomllib
from pathlib import Path
import pytest
from conftest import ROOT, files, python

FOUND = [o.relative_to(ROOT) for o in (ROOT/'nbs').rglob('*.ipynb')]
NOTEBOOKS = sorted(str(o) for o in FOUND if not any(p[0] in '._' for p in o.parts))
HUGE = {f'nbs/{o}.ipynb' for o in ( # more than a minute, of what other tests run too
    '16e_validation','20_measure','21_plan','22_judge','tutorials/full_svd','tutorials/own_videos')}
SLOW = HUGE | {f'nbs/{o}.ipynb' for o in ( # half a minute and more
    '14a_shards','17_train','18b_reproduce','23_evaluate','24_baselines','31_widgets',
    'tutorials/words','tutorials/family')}
RUN = [o for o in NOTEBOOKS if not re.match(r'nbs/0[2-6]_', o)] # those run with their solutions: test_house.py
NBDEV = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['nbdev']
LIMIT = NBDEV.get('cell_timeout', 600) # seconds; nbdev-test itself holds each cell to it


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The repository without its history and without what .gitignore names"
    lines = [o.strip() for o in (ROOT/'.gitignore').read_text().splitlines() if o.strip() and o[0]!='#']
    def ignore(folder, names):
        here = [o.strip('/') for o in lines if o[0]!='/' or Path(folder)==ROOT] + ['.git']
        return [o for o in names if any(fnmatch.fnmatch(o,p) for p in here)]
    return shutil.copytree(ROOT, tmp_path_factory.mktemp('copy')/'repo', ignore=ignore)


def nbdev(command, *args, copy):
    "An nbdev command at the root of the copy, whose package is the one imported"
    script = Path(sys.executable).with_name(f'nbdev-{command}')
    return python(script, *args, cwd=copy, env=dict(PYTHONPATH=str(copy)), timeout=2*LIMIT)


def test_there_are_notebooks():
    "One a module at least, so that the tests below have something to test"
    made = {o.stem for o in (ROOT/'sfv_lite').glob('*.py')} - {'__init__','__main__','_modidx'}
    sources = [''.join(c['source']) for o in NOTEBOOKS for c in json.loads((ROOT/o).read_text())['cells']]
    exporting = {o.split()[2] for o in sources if o.startswith('#| default_exp')}
    assert made and made==exporting


MARKS = {o:[pytest.mark.slow]*(o in SLOW) + [pytest.mark.huge]*(o in HUGE) for o in RUN}


@pytest.mark.parametrize('notebook', [pytest.param(o, marks=MARKS[o]) for o in RUN])
def test_notebook_runs(notebook, copy):
    """From the first cell to the last, in a fresh process, in time, with every assertion in it;
    a notebook that nbdev overlooks fails as well"""
    done = nbdev('test', '--n-workers', 0, '--do-print', notebook, copy=copy)
    said = done.stdout[-2000:]+done.stderr[-4000:]
    assert done.returncode==0 and 'Success.' in done.stdout and f'Completed {copy/notebook}' in done.stdout, said


@pytest.mark.parametrize('command', ['export', 'clean'])
def test_what_is_committed_is_current(command, copy):
    """`nbdev-export` and `nbdev-clean` change nothing: the package is what its notebooks say,
    and the notebooks hold no execution counts or strange metadata"""
    before = files(copy)
    done = nbdev(command, copy=copy)
    after = files(copy)
    changed = [k for k in {**before,**after} if before.get(k)!=after.get(k) and '__pycache__' not in k]
    for k in changed: (copy/k).write_bytes(before[k]) if k in before else (copy/k).unlink()
    assert done.returncode==0 and not changed, (changed, done.stderr)


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook_is_fit_to_read(notebook):
    """Outputs are there, none is an error or a warning, no path of the machine it ran on shows,
    and the file is below 1.5 MB"""
    text = (ROOT/notebook).read_text()
    cells = [o for o in json.loads(text)['cells'] if o['cell_type']=='code']
    outputs = [o for c in cells for o in c['outputs']]
    assert len(outputs)>0, "was never run"
    size = len(text.encode())
    assert size < 1.5e6
    complaints = [o for o in outputs if o['output_type']=='error' or o.get('name')=='stderr']
    wrong = [''.join(o.get('text', o.get('traceback','')))[:300] for o in complaints]
    assert not wrong
    shown = json.dumps(outputs)
    paths = [o for o in (str(ROOT), 'site-packages', os.path.expanduser('~/')) if o in shown]
    assert not paths


@pytest.mark.parametrize('script,made', [('make_readme.py','README.md'), ('make_maps.py','nbs/images/way-02.svg')])
def test_what_scripts_made_is_current(script, made, copy):
    """README.md is what docs/make_readme.py makes of nbs/index.ipynb, the maps are what docs/make_maps.py draws,
    and the checks notice when they are not"""
    check = lambda: python(f'docs/{script}', '--check', cwd=copy, env=dict(PYTHONPATH=str(copy)))
    done = check()
    assert done.returncode==0, done.stdout+done.stderr
    whole = (copy/made).read_text()
    try:
        (copy/made).write_text(whole+'\nsomething by hand\n')
        assert check().returncode!=0
    finally: (copy/made).write_text(whole)


def test_every_module_is_on_the_map(copy):
    "Each numbered notebook has its map, and shows it"
    for name in (o for o in NOTEBOOKS if Path(o).stem[0].isdigit()):
        assert f"images/way-{Path(name).stem.split('_')[0]}.svg" in (ROOT/name).read_text(), name


def test_no_import_goes_up():
    "A module imports only from modules whose notebooks come before its own: README, The house"
    house = [json.loads(o.read_text(encoding='utf-8'))['cells'] for o in sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))]
    sources = [''.join(''.join(c['source'])+'\n' for c in cells) for cells in house]
    order = [re.search(r'#\| default_exp (\w+)', o)[1] for o in sources]
    for i,module in enumerate(order):
        text = (ROOT/f'sfv_lite/{module}.py').read_text(encoding='utf-8')
        found = set(re.findall(r'^\s*from (?:\.|sfv_lite\.)(\w+) import', text, re.M))
        assert found <= set(order[:i]), f"{module} imports {sorted(found-set(order[:i]))}"
