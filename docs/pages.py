"Notebooks, and the files they link to, as pages for Sphinx and MyST-NB. nbdev's directives are obeyed; nothing is run"
import ast, json, re
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
PICTURES = '.gif','.png','.jpg','.svg','.webp'
LANGUAGES = {'.py':'python', '.sh':'bash', '.yaml':'yaml', '.ini':'ini', '.json':'json', '.toml':'toml'}
ORPHAN = '---\norphan: true\n---\n\n' # a page outside the navigation


def notebooks(folder=''):
    "Name below nbs/ → notebook, for every notebook of a folder, in order"
    found = sorted((NBS/folder).glob('*.ipynb'))
    return {o.relative_to(NBS).with_suffix('').as_posix(): json.loads(o.read_text(encoding='utf-8')) for o in found}


def source(cell): return ''.join(cell['source'])


def title(nb): return re.match(r'# (.*)', source(nb['cells'][0]))[1]


def directives(cell):
    "nbdev's `#| name value` lines of a code cell as a dict, and its code without them and without housekeeping magics"
    code = source(cell)
    found = dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*?)[ \t]*$', code, re.M)) if cell['cell_type']=='code' else {}
    housekeeping = r'^(#\||.*#\|\s*hide_line|%(matplotlib|config|\w*load_ext|autoreload)\b).*\n?'
    return found, re.sub(housekeeping, '', code, flags=re.M).strip('\n')


def module_of(nb):
    "The module a notebook exports, or None"
    return next((d['default_exp'] for d,_ in map(directives, nb['cells']) if 'default_exp' in d), None)


def defined(code):
    "The names that exported code defines, each with the statement that does"
    found = {}
    for statement in ast.parse(code).body:
        for target in getattr(statement, 'targets', [statement]):
            for o in getattr(target, 'elts', [target]):
                if hasattr(o,'name') or isinstance(o,ast.Name): found[getattr(o,'name',None) or o.id] = statement
    return found


def code_cell(cell):
    "A code cell with MyST-NB's tags in place of directives, None if it is hidden; and the names it exports"
    d,code = directives(cell)
    names = defined(code) if d.keys() & {'export','exports'} else {}
    if d.keys() & {'hide','default_exp'} or d.get('include')=='false' or not code: return None,names
    tags = {
        'hide-input': d.keys() & {'export','exporti'} or d.get('code-fold')=='true',
        'remove-input': d.get('echo')=='false',
        'remove-output': d.get('output')=='false'}
    prompt = ': '.join(filter(None, ['Source', ', '.join(names)]))
    shown = dict(code_prompt_show=prompt, code_prompt_hide=prompt)
    if 'fig-alt' in d: shown['image'] = dict(alt=d['fig-alt'])
    return cell | dict(source=code, metadata=dict(tags=[k for k,on in tags.items() if on], mystnb=shown)),names


def opening(text, name, module):
    "The first cell: title, subtitle, and where its API and the notebook itself are"
    if name=='index': return re.sub(r'\A(# .*\n)\s*> ', r'\1\n{.lead}\n', text)
    links = f"{{download}}`download the notebook </notebooks/{name}.ipynb>`"
    if module: links = f"[`sfv_lite.{module}`](/api/{module}.md) · {links}"
    return re.sub(r'\A(# .*\n)\s*> (.*)', lambda m: f"{m[1]}\n{{.lead}}\n{m[2]}\n\n{{.links}}\n{links}", text)


def labelled(text, label):
    "A MyST label before the last heading of a cell: the text, and the label or None"
    prose = re.sub(r'^```.*?^```$', lambda m: ' '*len(m[0]), text, flags=re.S|re.M)
    at = max((o.start() for o in re.finditer(r'^#+ ', prose, re.M)), default=None)
    return (text,None) if at is None else (f'{text[:at]}({label})=\n{text[at:]}',label)


def slug(anchor):
    "An anchor as the site has it, from one as Jupyter or GitHub have it"
    return re.sub(r'[^\w -]', '', unquote(anchor).lower()).replace(' ','-')


class Site:
    """A folder of pages under way. `derived` holds for (module, name) the label of the section where it is derived,
    `broken` what links lack"""
    def __init__(self, folder): self.folder,self.derived,self.broken = Path(folder),{},[]

    def write(self, path, content):
        file = self.folder/path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content,bytes) else content.encode())

    def fetch(self, path, here):
        """Where on the site a file of the repository is that `here` links to: pictures come along, files that are not
        notebooks become pages"""
        name = normpath((here.parent/path).as_posix())
        file,page = ROOT/name,f'files/{name}'+('' if name.endswith(PICTURES) else '.md')
        if name.startswith('..') or not file.exists(): self.broken.append(f"{here}: its link to {path} leads nowhere")
        elif name=='README.md': page = 'index.ipynb' # which it is made of
        elif name.endswith('.ipynb'): page = file.relative_to(NBS).as_posix()
        elif not (self.folder/page).exists():
            self.write(page, file.read_bytes() if name.endswith(PICTURES) else '') # '': files may link to each other
            if page.endswith('.md'): self.write(page, self.file_page(Path(name)))
        return '/'+page

    def relinked(self, text, here):
        "Markdown of the file `here` with links that hold on the site; what stands in code fences is left alone"
        def link(m):
            path,_,anchor = m[2].partition('#')
            if re.match(r'[a-z]+:|/', path): return m[0]
            return m[1] + (path and self.fetch(unquote(path), here)) + (anchor and '#'+slug(anchor)) + m[3]
        parts = re.split(r'(^```.*?^```$)', text, flags=re.S|re.M)
        for pattern in (r'(\]\()([^)\s]+)(\))', r'((?:src|href)=")([^"]+)(")'):
            parts[::2] = [re.sub(pattern, link, o) for o in parts[::2]]
        return ''.join(parts)

    def file_page(self, path):
        "Markdown as it is, any other file as code, a folder as all of its files"
        file = ROOT/path
        if file.suffix=='.md': return ORPHAN+self.relinked(file.read_text(encoding='utf-8'), path)
        code = lambda o: f"````{LANGUAGES.get(o.suffix,'text')}\n{o.read_text(encoding='utf-8')}\n````"
        if file.is_dir(): parts = [f'## {o.name}\n\n{code(o)}' for o in sorted(file.iterdir()) if o.is_file()]
        else: parts = [code(file)]
        return ORPHAN + '\n\n'.join([f'# {path}', *parts])

    def notebook(self, name, nb, after=''):
        "Write a notebook's page: a label before each cell that opens a section, and more markdown at its end"
        here,module,label,cells = Path(f'nbs/{name}.ipynb'),module_of(nb),name,[]
        for i,cell in enumerate(nb['cells']):
            if cell['cell_type']=='code':
                cell,names = code_cell(cell)
                self.derived.update(((module,n),label) for n in names)
            else:
                text = self.relinked(source(cell), here)
                if i==0: text = opening(text, name, module)
                text,new = labelled(text, f'{name}-{i}')
                cell,label = cell | dict(source=text),new or label
            if cell: cells.append(cell)
        if after: cells.append(dict(id='after', cell_type='markdown', metadata={}, source=after))
        self.write(f'{name}.ipynb', json.dumps(nb | dict(cells=cells)))
        self.write(f'notebooks/{name}.ipynb', (ROOT/here).read_bytes())
