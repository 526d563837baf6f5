"""A module's API page, read from its source without importing it: signatures, docstrings, and docments (comments beside
arguments) as tables"""
import ast, copy, io, re, tokenize
from pages import ROOT, defined, title

FUNCTIONS = ast.FunctionDef,ast.AsyncFunctionDef


def comments(code):
    "Line → the comment at its end"
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {o.start[0]: o.string.lstrip('# ') for o in tokens if o.type==tokenize.COMMENT}


def arguments(f):
    "Name, annotation, default and last line of each argument"
    a = f.args
    plain = a.posonlyargs+a.args
    named = [('',o) for o in plain] + [('*',a.vararg)] + [('',o) for o in a.kwonlyargs] + [('**',a.kwarg)]
    defaults = [None]*(len(plain)-len(a.defaults)) + a.defaults + [None] + a.kw_defaults + [None]
    told = [(star,o,d) for (star,o),d in zip(named, defaults) if o and o.arg not in ('self','cls')]
    return [(star+o.arg, o.annotation, d, (d or o).end_lineno) for star,o,d in told]


def fields(body):
    "The same of the fields of a dataclass or named tuple"
    return [(o.target.id, o.annotation, o.value, o.end_lineno) for o in body if isinstance(o,ast.AnnAssign)]


def signature(f):
    "Names and defaults; types stand in the table"
    args = copy.deepcopy(f.args)
    for o in ast.walk(args):
        if isinstance(o,ast.arg): o.annotation = None
    return f"({re.sub(r'^(self|cls)(, )?', '', ast.unparse(args))})"


def returned(f, says):
    """Annotation and comment of what is returned: beside the annotation, or beside the bracket that ends a signature of
    several lines"""
    if f.returns: return None if ast.unparse(f.returns)=='None' else (f.returns, says.get(f.returns.end_lineno))
    last,closed = max([f.lineno]+[o[3] for o in arguments(f)]),f.body[0].lineno-1
    return (None,says[closed]) if closed>last and closed in says else None


def table(rows, says, returns=None):
    "Arguments as a table, what is returned as its last row; without the columns in which nothing stands"
    code = lambda o: o and f'`{ast.unparse(o)}`'
    escaped = lambda name: name.replace('*', r'\*')
    rows = [(f'**{escaped(name)}**', code(kind), code(default), says.get(line)) for name,kind,default,line in rows]
    if returns: rows.append(('*returns*', code(returns[0]), '', returns[1]))
    columns = [o for o in zip(('name','type','default','meaning'), *rows) if any(o[1:])]
    if len(columns)<2: return ''
    head,*rows = zip(*columns)
    lines = [[(o or '').replace('|', r'\|') for o in row] for row in (head, ['---']*len(head), *rows)]
    return '\n'.join('| '+' | '.join(o)+' |' for o in lines)


def settings():
    "Key → its value and the comment above it in settings.ini, where it stands first"
    found,comment = {},''
    for line in (ROOT/'settings.ini').read_text(encoding='utf-8').splitlines():
        if line[:1]=='#': comment = line.lstrip('# ')
        elif '=' in line:
            key,value = re.split(r'\s*=\s*', line, maxsplit=1)
            found.setdefault(key, (value, comment))
        else: comment = ''
    return found


def recipe_table(rows):
    "The fields of a recipe: value and comment of settings.ini, and what each may be; keys of one comment together"
    known,above = settings(),None
    lines = [('key','in settings.ini','may be','meaning'), ('---',)*4]
    for name,kind,limits,_ in rows:
        if name not in known: continue
        value,comment = known[name]
        may_be = [f'`{ast.unparse(o)}`' for o in (kind,limits) if o and ast.unparse(o)!='field()']
        lines.append((f'**{name}**', f'`{value}`', ' '.join(may_be), '″' if comment==above else comment))
        above = comment
    return '\n'.join('| '+' | '.join(o)+' |' for o in lines)


def entry(kind, head, *blocks, option='', fence=':::'):
    "A directive of Sphinx's Python domain"
    options = [f':{option}:'] if option else []
    return '\n'.join([f'{fence}{{py:{kind}}} {head}', *options, '', *(f'{o}\n' for o in blocks if o), fence])


def function(f, says, *blocks, kind='function'):
    marks = {getattr(o,'id','') for o in f.decorator_list}
    option = next((o for o in ('classmethod','staticmethod') if o in marks), '')
    kind,head = ('property',f.name) if 'property' in marks else (kind,f.name+signature(f))
    return entry(kind, head, ast.get_docstring(f), table(arguments(f), says, returned(f, says)), *blocks, option=option)


def members(c, classes):
    "What stands in a class and, before it, in its private bases"
    bases = [classes[o.id] for o in reversed(c.bases) if getattr(o,'id','')[:1]=='_' and o.id in classes]
    return [o for b in bases for o in members(b, classes)] + c.body


def class_(c, says, classes, *blocks):
    "A class by its constructor or fields, and its public methods"
    body = members(c, classes)
    methods = {o.name:o for o in body if isinstance(o,FUNCTIONS)}
    init,rows = methods.get('__init__'),fields(body)
    bases = ', '.join(f'`{ast.unparse(o)}`' for o in c.bases if ast.unparse(o)[0]!='_')
    listed = recipe_table(rows) if c.name=='Recipe' else table(rows or (init and arguments(init)) or [], says)
    public = [function(o, says, kind='method') for k,o in methods.items() if k[0]!='_']
    return entry('class', c.name+(signature(init) if init else ''), ast.get_docstring(c), bases and f'A {bases}.',
        listed, *blocks, *public, fence='::::')


def constant(name, o, says, *blocks):
    "A name and its value; of several names in one line each its own"
    target,value = o.targets[0],o.value
    if isinstance(target,ast.Tuple): value = value.elts[[n.id for n in target.elts].index(name)]
    return entry('data', name, f'`{ast.unparse(value)}`', says.get(o.end_lineno), *blocks)


def module_page(module, name, nb, derived):
    "Everything that a module exports, in the order of its notebook, each with a link to the section that derives it"
    code = (ROOT/f'sfv_lite/{module}.py').read_text(encoding='utf-8')
    tree,says,found = ast.parse(code),comments(code),defined(code)
    classes = {k:o for k,o in found.items() if isinstance(o,ast.ClassDef)}
    entries = []
    for k in sorted(ast.literal_eval(found['__all__'].value), key=lambda k: found[k].lineno):
        o,link = found[k],f"{{.derived}}\nDerived in [](#{derived[module,k]})"
        if k in classes: entries.append(class_(o, says, classes, link))
        else: entries.append(function(o, says, link) if isinstance(o,FUNCTIONS) else constant(k, o, says, link))
    return '\n\n'.join([
        f'# sfv_lite.{module}',
        f'{{.lead}}\n{ast.get_docstring(tree)}',
        f'{{.links}}\nExported from [{title(nb)}](/{name}.ipynb)',
        f':::{{py:module}} sfv_lite.{module}\n:::',
        *entries])+'\n'
