"The site: every link holds, nothing comes from outside, and in a browser it can be read, searched and played with"
import ast, contextlib, functools, http.server, json, os, re, shutil, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest
from conftest import ROOT, python

pytest.importorskip('myst_nb', reason="the site needs pip install -e '.[docs]'")
CODE = 'pre','code','script','style'
BROWSERS = 'chromium','chromium-browser','google-chrome','google-chrome-stable'
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def trial():
    "A notebook with a live slider, the buttons of a player and formulas, as nbconvert --execute would save it"
    from ipywidgets import HBox, HTMLMath, IntSlider, Label, Play, jslink
    from ipywidgets.embed import embed_data
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    slider,label = IntSlider(3, max=9),Label('3')
    jslink((slider,'value'), (label,'value'))
    data = embed_data(HBox([Play(), slider, label, HTMLMath('$c_{in}$')]))
    view = new_output('display_data', {'application/vnd.jupyter.widget-view+json':data['view_specs'][0]})
    state = {'application/vnd.jupyter.widget-state+json':data['manager_state']}
    cells = [new_markdown_cell('# A slider\n> To be moved, from $x_0$ to $x_9$.'),
        new_code_cell('#| hide\nhidden = 1'), new_code_cell('#| echo: false\nslider', outputs=[view])]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    return new_notebook(cells=cells, metadata=dict(widgets=state, kernelspec=kernel))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site of this checkout and one more tutorial"
    copy,out = (tmp_path_factory.mktemp('site')/o for o in ('repo','site'))
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git','.venv','_docs','runs','weights','__pycache__'))
    (copy/'nbs/tutorials/trial.ipynb').write_text(json.dumps(trial()))
    done = python(copy/'docs/build.py', '-o', out)
    assert done.returncode==0, done.stdout+done.stderr
    return out


class Page(HTMLParser):
    "What a page points at, what can be pointed at in it, its text, and the prose in that"
    def __init__(self, file):
        super().__init__()
        self.ids,self.links,self.assets,self.text,self.prose,self.code = set(),[],[],[],[],0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.code += tag in CODE
        if attrs.get('id'): self.ids.add(attrs['id'])
        if tag=='a' and 'href' in attrs: self.links.append(attrs['href'])
        elif attrs.get('src') or (tag=='link' and attrs.get('href')):
            self.assets.append(attrs.get('src') or attrs['href'])

    def handle_endtag(self, tag): self.code -= tag in CODE

    def handle_data(self, text):
        self.text.append(text)
        if not self.code: self.prose.append(text)


@pytest.fixture(scope='module')
def pages(site): return {o:Page(o) for o in sorted(site.rglob('*.html'))}


def test_every_notebook_and_module_has_a_page(site, pages):
    """In the navigation of the first page, and every public name with its table in the API,
    linked to where it is derived"""
    linked = {normal(site/'index.html', o)[0] for o in pages[site/'index.html'].links}
    sources = [o for folder in ('nbs','nbs/tutorials') for o in (ROOT/folder).glob('*.ipynb')]
    notebooks = [o.relative_to(ROOT/'nbs').with_suffix('.html') for o in sources]
    modules = [o for o in (ROOT/'sfv_lite').glob('*.py') if o.stem[0]!='_']
    assert {site/o for o in notebooks} | {site/f'api/{o.stem}.html' for o in modules} <= linked
    for o in modules:
        assigned = (n for n in ast.parse(o.read_text()).body if isinstance(n,ast.Assign))
        public = next(ast.literal_eval(n.value) for n in assigned if n.targets[0].id=='__all__')
        page = pages[site/f'api/{o.stem}.html']
        assert {f'sfv_lite.{o.stem}.{n}' for n in public} <= page.ids
        assert ''.join(page.text).count('Derived in')==len(public)


def normal(page, link):
    "The file that a link of a page leads to, and the anchor in it"
    url = urlsplit(link)
    return (Path(os.path.normpath(page.parent/unquote(url.path))) if url.path else page), unquote(url.fragment)


def test_every_link_holds(pages):
    "Pages, downloads, pictures, scripts, and anchors"
    broken = []
    for page,o in pages.items():
        for link in o.links+o.assets:
            if re.match('[a-z]+:', link): continue
            file,anchor = normal(page, link)
            lost = anchor and file in pages and anchor not in pages[file].ids
            if lost or not file.is_file(): broken.append((page.name, link))
    assert not broken


def test_nothing_comes_from_outside(site, pages):
    "No script, style, picture or font"
    assert not [(k.name,o) for k,v in pages.items() for o in v.assets if re.match('([a-z]+:)?//', o)]
    outside = re.compile(r'(?:url\(|@import)[\s"\']*((?:https?:)?//[^)"\']*)')
    styles = {o.name:outside.findall(o.read_text()) for o in site.rglob('*.css')}
    assert not any(styles.values()), styles


def test_directives_are_obeyed(site, pages):
    "No directive shows, nor what it hides, nor the marks of a formula; pages and their pictures stay light"
    assert not [k.name for k,v in pages.items() if re.search(r'^#\|', ''.join(v.text), re.M) and 'files' not in k.parts]
    raw = {k.name:o for k,v in pages.items() for o in v.prose if re.search(r'\$|^\s*:::|\]\(', o)}
    assert not raw
    text = ''.join(pages[site/'tutorials/trial.html'].text)
    assert 'hidden = 1' not in text and 'To be moved' in text and not re.search(r'^slider$', text, re.M)
    def weight(page, assets):
        pictures = [normal(page,o)[0] for o in set(assets) if '_images' in o]
        return sum(o.stat().st_size for o in (page,*pictures))
    weights = {k.relative_to(site).as_posix():weight(k,v.assets) for k,v in pages.items()}
    for k,n in sorted(weights.items(), key=lambda o: -o[1])[:5]: print(f'{k}  {n/1e6:.1f} MB')
    assert max(weights.values()) < 3e6, weights


def test_search_index_knows_the_temporal_head(site):
    index = json.loads(re.search(r'\((.*)\)', (site/'searchindex.js').read_text(), re.S)[1])
    def found(word):
        entries = [index[part].get(word,[]) for part in ('terms','titleterms')]
        return {n for o in entries for n in ([o] if isinstance(o,int) else o)}
    assert index['docnames'].index('04_heads') in found('tempor') & found('head')


# ---------------------------------------------------------------- in a browser
FAINT = """() => {  // texts whose contrast with what lies behind them is below 4.5, as WCAG counts it
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const rgba = c => {
    paint.clearRect(0,0,1,1)
    paint.fillStyle = c
    paint.fillRect(0,0,1,1)
    const d = paint.getImageData(0,0,1,1).data
    return [d[0],d[1],d[2],d[3]/255]
  }
  const over = (a,b) => [0,1,2].map(i => a[3]*a[i]+(1-a[3])*b[i]).concat(1)
  const back = e => {
    if (!e) return [255,255,255,1]
    const c = rgba(getComputedStyle(e).backgroundColor)
    return c[3]==1 ? c : over(c, back(e.parentElement))
  }
  const linear = v => v<=.03928 ? v/12.92 : ((v+.055)/1.055)**2.4
  const light = c => c.slice(0,3).map(v => linear(v/255)).reduce((s,v,i) => s+v*[.2126,.7152,.0722][i], 0)
  const faint = {}, seen = new Set()
  const walk = document.createTreeWalker(document.querySelector('.content'), NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim()
    if (!text || !e.checkVisibility({visibilityProperty: true})) continue
    if (e.closest('script,style,mjx-assistive-mml,.headerlink')) continue
    const b = back(e), colour = getComputedStyle(e).color, key = colour+b
    if (seen.has(key)) continue
    seen.add(key)
    const [lo,hi] = [light(b), light(over(rgba(colour), b))].sort((x,y) => x-y), ratio = (hi+.05)/(lo+.05)
    if (ratio<4.5) faint[key] = `${e.tagName}.${e.className} "${text.slice(0,30)}" ${ratio.toFixed(1)}`
  }
  return Object.values(faint)
}"""
UNSET = """() => [...document.querySelectorAll('.content .math')]
  .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror'))
  .map(e => e.textContent)"""


@contextlib.contextmanager
def served(folder):
    "A folder over HTTP on this machine"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1',0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def browser(site):
    "A tab, the address of the site, and the list where complaints gather"
    if not BROWSER: pytest.skip("needs Chromium or Chrome")
    playwright = pytest.importorskip('playwright.sync_api', reason="needs playwright, of pip install -e '.[dev]'")
    with served(site) as address, playwright.sync_playwright() as p:
        tab,complaints = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox']).new_page(),[]
        tab.on('console', lambda o: o.type=='error' and complaints.append(o.text))
        tab.on('pageerror', lambda o: complaints.append(str(o)))
        tab.on('requestfailed', lambda o: complaints.append(f'failed: {o.url}'))
        inside = (address,'data:','blob:')
        tab.on('request', lambda o: o.url.startswith(inside) or complaints.append(f'from outside: {o.url}'))
        yield tab,address,complaints


def test_every_page_can_be_read(site, pages, browser):
    "No complaint in the console, formulas set, no faint text in either theme, nothing wider than a phone"
    tab,address,complaints = browser
    for page in pages:
        tab.set_viewport_size(dict(width=1280, height=900))
        tab.emulate_media(color_scheme='light')
        tab.goto(f'{address}/{page.relative_to(site).as_posix()}', wait_until='load')
        if tab.evaluate("() => !!document.querySelector('.math')"):
            tab.evaluate('() => MathJax.startup.promise.then(() => 0)')
        complaints += [f'{page.name}: not set: {o}' for o in tab.evaluate(UNSET)]
        for theme in 'light','dark':
            tab.emulate_media(color_scheme=theme)
            complaints += [f'{page.name}: faint in {theme}: {o}' for o in tab.evaluate(FAINT)]
        tab.set_viewport_size(dict(width=375, height=800))
        width = tab.evaluate('() => document.documentElement.scrollWidth')
        if width>375: complaints.append(f'{page.name}: {width} pixels wide on a phone')
    assert not complaints, '\n'.join(complaints)


def test_sliders_move(site, pages, browser):
    """By the keyboard, on every page that has one, with their readout; on the trial page also what is linked to it,
    and a formula in a widget"""
    tab,address,complaints = browser
    live = [o for o in sorted(pages, key=lambda o: o.name=='trial.html') if 'widget-view+json' in o.read_text()]
    for page in live:
        tab.goto(f'{address}/{page.relative_to(site).as_posix()}')
        readout = tab.locator('.widget-slider .widget-readout').first
        before = readout.inner_text()
        for key in 'ArrowRight','ArrowLeft','ArrowLeft': # whatever end it may stand at
            tab.locator('.widget-slider [role=slider]').first.press(key)
        assert readout.inner_text()!=before, page.name
    linked = tab.locator('.jupyter-widgets.widget-label') # the trial is the last page
    assert linked.inner_text()==readout.inner_text()=='2'
    tab.locator('.widget-htmlmath mjx-container').wait_for()
    assert live and not complaints, complaints


def test_search_finds_the_temporal_head(browser):
    tab,address,complaints = browser
    tab.goto(f'{address}/search.html?q=temporal+head')
    tab.locator('#search-results li a', has_text='Two judges').first.wait_for()
    assert not complaints, complaints
