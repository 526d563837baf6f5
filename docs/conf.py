"Sphinx's settings; docs/build.py writes the pages"
import re
from importlib.metadata import files
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

project = 'sfv_lite'
author = copyright = 'the sfv_lite authors'
html_title = project
html_theme = 'furo'
html_static_path = ['static', *(str(o.locate()) for o in files('sphinx-mathjax-offline') if o.name=='tex-svg-full.js')]
html_css_files = ['site.css']
html_js_files = ['site.js']
coloured = 'brand-primary','brand-content','brand-visited','api-name','api-pre-name'
html_theme_options = {f'{mode}_css_variables': {f'color-{o}':colour for o in coloured}
    for mode,colour in (('light','#0f5f78'),('dark','#86cddd'))}
pygments_dark_style = 'github-dark'
html_favicon = 'static/icon.svg'
html_domain_indices = False
html_copy_source = False
extensions = ['myst_nb']
exclude_patterns = ['notebooks'] # the originals, for download

myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'attrs_block', 'html_image']
myst_heading_anchors = 4
myst_dmath_double_inline = True # $$ within a paragraph
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {'html-manager/embed.js': {}}
mathjax_path = 'tex-svg-full.js'
mathjax3_config = {
    'options': {'enableMenu': False}, # parts of it would be fetched
    'tex': {'inlineMath': [['$','$'], [r'\(',r'\)']]}} # widgets write $
maximum_signature_line_length = 100
add_module_names = False


class LinkedNames(SphinxPostTransform):
    """Code in prose that names a module or what it exports leads to the API; a plain word or a name that two modules
    share does not"""
    default_priority = 5
    def run(self, **kwargs):
        names = {}
        for full,o in self.env.domains['py'].objects.items():
            names.setdefault(full if o.objtype=='module' else full.split('.',2)[2], []).append(o)
        for code in list(self.document.findall(nodes.literal)):
            found,plain = names.get(code.astext(), []),re.fullmatch('[a-z]+', code.astext())
            if len(found)!=1 or plain or isinstance(code.parent, nodes.reference|nodes.title): continue
            target = found[0].docname,found[0].node_id
            code.replace_self(make_refnode(self.app.builder, self.env.docname, *target, code.deepcopy()))


def setup(app): app.add_post_transform(LinkedNames)
