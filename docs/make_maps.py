"nbs/images/way-*.svg: the way of the data through the notebooks, one map each, its own box and arrows in front. `--check` only says whether they are current."
import sys
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1]/'nbs'/'images'
W,H,COL,ROW = 116,42,176,80 # of a box; from one to the next
BOXES = { # notebook → column, row, what is in it
    '00 video':(0,0,'clips'), '01 edm':(0,2,'noise levels'), '02 svd':(1,1,'the network'), '03 sampling':(3,2,'noise to clip'), '04 heads':(2,1,'two judges'), '05 objective':(3,1,'losses'),
    '06a shots':(1,0,'where cuts are'), '06b films':(2,0,'films to clips'), '06c footage':(3,0,'folders to clips'), '06d shards':(4,0,'clips to latents'), '06e stream':(5,0,'dealt out'),
    '07 recipe':(2,2,'every number'), '08 train':(4,1,'two loops'), '08b plan':(5,1,'what it costs'), '09 evaluate':(4,2,'how good'),
    '10 baselines':(5,2,'rivals'), '11 cli':(6,0,'one command'), '12 widgets':(6,2,'to touch')}
ARROWS = [('00 video','06a shots','pictures'), ('00 video','02 svd','pixels'), ('01 edm','02 svd','σ, c'), ('06a shots','06b films','shots'), ('06b films','06c footage','clips'), ('06c footage','06d shards','clips'), ('06d shards','06e stream','shards'), ('06e stream','08 train','batches'), ('02 svd','04 heads','features'), ('02 svd','03 sampling','guesses'), ('04 heads','05 objective','logits'),
    ('05 objective','08 train','losses'), ('07 recipe','08 train','numbers'), ('08 train','08b plan','a step'), ('03 sampling','09 evaluate','clips'), ('08 train','09 evaluate','students'), ('09 evaluate','10 baselines','marks'),
    ('08 train','11 cli','runs'), ('08 train','12 widgets','logs')]


def centre(name): return BOXES[name][0]*COL+W/2+4, BOXES[name][1]*ROW+H/2+4


def arrow(a, b, text, here):
    "From the edge of one box to the edge of the other, its name beside it if it belongs to this notebook"
    (x,y),(u,v) = centre(a),centre(b)
    dx,dy = u-x,v-y
    cut = min(W/2/abs(dx) if dx else 9, H/2/abs(dy) if dy else 9)
    x,y,u,v = x+dx*cut,y+dy*cut,u-dx*cut,v-dy*cut
    mine = here in (a,b)
    line = f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{u:.0f}" y2="{v:.0f}" stroke="{"#c2410c" if mine else "#9ca3af"}" stroke-width="{2 if mine else 1}" marker-end="url(#{"mine" if mine else "other"})"/>'
    return line + (f'<text x="{(x+u)/2+(6 if x==u else -4):.0f}" y="{(y+v)/2+(4 if x==u else -5):.0f}" text-anchor="{"start" if x==u else "middle"}" fill="#c2410c" stroke="white" stroke-width="3" paint-order="stroke">{escape(text)}</text>' if mine else '')


def box(name, here):
    "A notebook: number and module, and a word or two"
    (x,y),mine = centre(name),name==here
    return (f'<rect x="{x-W/2:.0f}" y="{y-H/2:.0f}" width="{W}" height="{H}" rx="6" fill="{"#ffedd5" if mine else "#f3f4f6"}" stroke="{"#c2410c" if mine else "#9ca3af"}" stroke-width="{2 if mine else 1}"/>'
        f'<text x="{x:.0f}" y="{y-3:.0f}" fill="#111827" font-weight="bold">{name}</text><text x="{x:.0f}" y="{y+12:.0f}" fill="#374151">{escape(BOXES[name][2])}</text>')


def drawn(here):
    tip = lambda name,color: f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
    parts = sorted((arrow(*o, here) for o in ARROWS), key=lambda o:'url(#mine)' in o) + [box(o, here) for o in BOXES]
    return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(o[0] for o in BOXES.values())*COL+W+8} {2*ROW+H+8}" font-family="sans-serif" font-size="13" text-anchor="middle">', f'<defs>{tip("mine","#c2410c")}{tip("other","#9ca3af")}</defs>', *parts, '</svg>'])+'\n'


def main():
    maps = {IMAGES/f'way-{o.split()[0]}.svg':drawn(o) for o in BOXES}
    stale = [o for o,text in maps.items() if not o.exists() or o.read_text(encoding='utf-8')!=text]
    if '--check' in sys.argv[1:]: sys.exit(f"{', '.join(o.name for o in stale)}: not current; run python docs/make_maps.py" if stale else 0)
    for o in stale: o.write_text(maps[o], encoding='utf-8')


if __name__=='__main__': main()
