"""The site from the committed notebooks: `python docs/build.py` writes `_docs/`. Nothing is run, nothing is fetched,
a warning is an error"""
import argparse, shutil, sys, tempfile
from pathlib import Path
from sphinx.cmd.build import main as sphinx
from api import module_page
from pages import ROOT, Site, module_of, notebooks, title


def tree(caption, entries):
    "A part of the navigation"
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *entries, '```'])


def write_pages(folder):
    "The sources of all pages"
    site,chapters,tutorials = Site(folder),notebooks(),notebooks('tutorials')
    index = chapters.pop('index')
    for name,nb in {**chapters, **tutorials}.items(): site.notebook(name, nb)
    modules = {module_of(nb):name for name,nb in chapters.items() if module_of(nb)}
    for module,name in modules.items():
        site.write(f'api/{module}.md', module_page(module, name, chapters[name], site.derived))
    number = lambda name: name.split('_')[0]
    site.notebook('index', index, '\n\n'.join([
        tree('The notebooks', [f'{number(name)} · {title(nb)} </{name}>' for name,nb in chapters.items()]),
        tree('Tutorials', tutorials),
        tree('API', [f'{module} </api/{module}>' for module in modules])]))
    if site.broken: sys.exit('\n'.join(site.broken))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    help = "folder of the site, made anew (default: _docs)"
    parser.add_argument('-o', '--out', type=Path, default=ROOT/'_docs', help=help)
    out = parser.parse_args().out
    if out.exists() and not (out/'searchindex.js').exists():
        sys.exit(f"{out}: exists and is no site; choose another folder")
    with tempfile.TemporaryDirectory() as temp:
        pages,site = Path(temp)/'pages',Path(temp)/'site'
        write_pages(pages)
        strict = '-q','-W','--keep-going'
        faults = sphinx([*strict, '-c', str(ROOT/'docs'), '-d', temp+'/trees', str(pages), str(site)])
        if faults: sys.exit("the site has faults: see above")
        if out.exists(): shutil.rmtree(out)
        shutil.move(site, out)
    print(out/'index.html')


if __name__=='__main__': main()
