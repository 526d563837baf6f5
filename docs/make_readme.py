"README.md from nbs/index.ipynb, without Quarto. `--check` only says whether README.md is current, by its exit code."
import json, re, sys
from pathlib import Path, PurePosixPath
from posixpath import normpath

ROOT = Path(__file__).resolve().parents[1]
HERE = PurePosixPath('nbs')  # where the notebook lies, seen from README.md


def from_root(text):
    "Make relative links and pictures start at the root; what stands in code fences is left alone"
    def link(m):
        target = m[2] if re.match(r'[a-z]+:|[#/]', m[2]) else normpath(str(HERE/m[2]))
        return m[1]+target+m[3]
    parts = re.split(r'(^```.*?^```$)', text, flags=re.S|re.M)
    for pattern in (r'(\]\()([^)\s]+)(\))', r'((?:src|href)=")([^"]+)(")'):
        parts[::2] = [re.sub(pattern, link, o) for o in parts[::2]]
    return ''.join(parts)


def fence(text, language=''):
    return f"```{language}\n{text.strip()}\n```"


def shown(output):
    "A text output as markdown; pictures and warnings are left out, README.md has none of its own"
    data = output.get('data', {})
    if output.get('name')=='stderr' or any(o.startswith('image/') for o in data): return None
    if 'text/markdown' in data: return from_root(''.join(data['text/markdown']))
    text = ''.join(output.get('text') or data.get('text/plain') or '')
    return fence(text) if text.strip() else None


def cell_blocks(cell):
    "A cell as blocks of markdown"
    source = ''.join(cell['source'])
    if cell['cell_type']=='markdown': return [from_root(source)]
    if cell['cell_type']!='code' or re.search(r'^#\|\s*(hide|include:\s*false)', source, re.M): return []
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
    return ([fence(code, 'python')] if code.strip() else []) + [o for o in map(shown, cell['outputs']) if o]


def readme():
    cells = json.loads((ROOT/HERE/'index.ipynb').read_text(encoding='utf-8'))['cells']
    note = '<!-- made from nbs/index.ipynb by docs/make_readme.py: change the notebook, not this file -->'
    return '\n\n'.join([*(b.strip() for c in cells for b in cell_blocks(c)), note])+'\n'


def main():
    path,text = ROOT/'README.md',readme()
    if '--check' in sys.argv[1:]:
        old = path.read_text(encoding='utf-8') if path.exists() else ''
        if old!=text: sys.exit("README.md is not what nbs/index.ipynb says: run python docs/make_readme.py")
    else: path.write_text(text, encoding='utf-8')


if __name__=='__main__': main()
