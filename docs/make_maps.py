"""nbs/images: `way-*`, the way of the data through the notebooks, one map each, its own box and arrows in front;
`step`, the picture of one step of SF-V; `clip-*`, our clip as a chapter left it, which the next one opens with.
`--check` only says whether they are current."""
import base64, json, sys
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1]/'nbs'/'images'
MINE,OTHER,BLUE,INK = '#c2410c','#9ca3af','#2563eb','#111827'

# the maps -----------------------------------------------------------------------------------------

W,H,COL,ROW = 124,42,182,72 # of a box; from one to the next
WINGS = {0:'I  the idea', 1:'II  at work', 4:'III  is it any good', 5:'IV  faces'} # by row
BOXES = { # notebook → column, row, what is in it
    '00 video':(0,0,'clips'), '01 edm':(1,0,'noise levels'), '02 svd':(2,0,'the network'),
    '03 sampling':(3,0,'noise to clip'), '04 heads':(4,0,'two judges'), '05 objective':(5,0,'losses'),
    '06 sfv':(6,0,'one step'), '11 files':(0,1,'whole or not'), '12 pipelines':(1,1,'stock folders'),
    '13a shots':(2,1,'where cuts are'), '13b films':(3,1,'films to clips'), '13c footage':(4,1,'folders to clips'),
    '14a shards':(5,1,'clips to latents'), '14b stream':(6,1,'dealt out'), '14c digits':(1,2,'drawn clips'),
    '10 recipe':(2,2,'every number'), '15 fit':(3,2,'less memory'), '15b parts':(1,3,'shared weights'),
    '11b inspection':(0,2,'from strangers'), '11c shortcuts':(0,3,'less work'),
    '16a runs':(2,3,'one owner'),
    '16b checkpoint':(3,3,'whole states'), '16c health':(4,3,'bad signs'), '16d loop':(4,2,'a run survives'),
    '16e validation':(5,3,'better?'),
    '17 train':(5,2,'three runs'), '18 export':(6,2,'to give away'), '18b reproduce':(6,3,'once more'),
    '24 baselines':(0,4,'rivals'), '23b films_exam':(1,4,'of films'), '23 evaluate':(2,4,'how good'),
    '22 judge':(3,4,'a distance'), '21b kernels':(4,4,'what for'), '21 plan':(5,4,'what it costs'),
    '20 measure':(6,4,'what it takes'),
    '30a verbs':(5,5,'each verb'), '30b cli':(6,5,'one command'), '31 widgets':(3,5,'to touch')}
ARROWS = [
    ('00 video','01 edm','clips'), ('01 edm','02 svd','levels'), ('02 svd','03 sampling','guesses'),
    ('02 svd','04 heads','features'), ('04 heads','05 objective','logits'), ('05 objective','06 sfv','losses'),
    ('02 svd','12 pipelines','networks'), ('13a shots','13b films','shots'),
    ('13b films','13c footage','clips'), ('13c footage','14a shards','clips'), ('14a shards','14b stream','shards'),
    ('14b stream','17 train','batches'), ('14c digits','17 train','digits'), ('16e validation','17 train','figures'),
    ('06 sfv','17 train','a step'), ('15 fit','16d loop','LoRA'), ('15b parts','16b checkpoint','whole again'),
    ('16d loop','17 train','the loop'), ('10 recipe','16a runs','numbers'), ('16a runs','16b checkpoint','a run'),
    ('16b checkpoint','16c health','states'), ('16c health','16d loop','signs'),
    ('11 files','11b inspection','folders'), ('11c shortcuts','12 pipelines','short cuts'),
    ('11b inspection','12 pipelines','inspected'), ('18 export','18b reproduce','bases'),
    ('17 train','18 export','students'),
    ('17 train','20 measure','a step'), ('20 measure','21 plan','counts'), ('21 plan','21b kernels','fake tensors'),
    ('22 judge','23 evaluate','distance'),
    ('17 train','23 evaluate','students'), ('23 evaluate','24 baselines','marks'),
    ('23b films_exam','24 baselines','ways'), ('18 export','30a verbs','runs'),
    ('30a verbs','30b cli','verbs'), ('23 evaluate','31 widgets','logs')]


def way_centre(name): return BOXES[name][0]*COL+W/2+4, BOXES[name][1]*ROW+H/2+18


def way_arrow(a, b, text, here):
    "From one box to another, its name beside it if it belongs to this notebook"
    mine = here in (a,b)
    (i,j,_),(k,l,_) = BOXES[a],BOXES[b]
    draw = over if j==l and abs(i-k)>1 else arrow
    return draw(way_centre(a), way_centre(b), W, H, text if mine else '', 'mine' if mine else 'other')


def arrow(start, end, width, height, text, kind):
    "Between the edges of two boxes of this size; `kind` is a marker's name"
    (x,y),(u,v) = start,end
    dx,dy = u-x,v-y
    cut = min(width/2/abs(dx) if dx else 9, height/2/abs(dy) if dy else 9)
    x,y,u,v = x+dx*cut,y+dy*cut,u-dx*cut,v-dy*cut
    line = line_of(f'M{x:.0f} {y:.0f} L{u:.0f} {v:.0f}', kind)
    if not text: return line
    upright = x==u
    return line + label((x+u)/2+6*upright, (y+v)/2+(4 if upright else -5), text, 'start' if upright else 'middle')


def over(start, end, width, height, text, kind):
    "Over the boxes that stand between two of a row"
    (x,y),(u,_) = start,end
    top = y-height/2
    line = line_of(f'M{x:.0f} {top:.0f} C{x:.0f} {top-14:.0f} {u:.0f} {top-14:.0f} {u:.0f} {top:.0f}', kind)
    return line + (label((x+u)/2, top-12, text) if text else '')


def line_of(path, kind, dash=''):
    colour,thick = dict(mine=(MINE,2), other=(OTHER,1), forward=(BLUE,1))[kind]
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{thick}" {dash}marker-end="url(#{kind})"/>'


def label(x, y, text, anchor='middle', colour=MINE):
    "Words on a white edge, so that they can be read across lines"
    at,words = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"',escape(text)
    edge = f'<text {at} fill="white" stroke="white" stroke-width="3">{words}</text>'
    return f'{edge}<text {at} fill="{colour}">{words}</text>'


def box(centre, width, height, mine, bold, small=''):
    "A box with a name, and a word or two"
    x,y = centre
    fill,stroke,thick = ('#ffedd5',MINE,2) if mine else ('#f3f4f6',OTHER,1)
    words = f'<text x="{x:.0f}" y="{y+(-3 if small else 4):.0f}" fill="{INK}" font-weight="bold">{escape(bold)}</text>'
    if small: words += f'<text x="{x:.0f}" y="{y+12:.0f}" fill="#374151">{escape(small)}</text>'
    return (f'<rect x="{x-width/2:.0f}" y="{y-height/2:.0f}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{thick}"/>{words}')


def tip(name, colour):
    "An arrow's head"
    return (f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>')


def svg(width, height, parts):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">')
    tips = f'<defs>{tip("mine",MINE)}{tip("other",OTHER)}{tip("forward",BLUE)}</defs>'
    return '\n'.join([head, tips, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, '</svg>'])+'\n'


def way(here):
    "The map of one notebook"
    arrows = sorted((way_arrow(*o, here) for o in ARROWS), key=lambda o:'url(#mine)' in o)
    boxes = [box(way_centre(o), W, H, o==here, o, BOXES[o][2]) for o in BOXES]
    signs = [label(4, i*ROW+12, o, 'start', '#6b7280') for i,o in WINGS.items()]
    return svg(6*COL+W+8, 5*ROW+H+22, [*arrows, *boxes, *signs])


# one step -----------------------------------------------------------------------------------------

SW,SH = 112,40
STEP = { # name → centre, words below it
    'x₀':((60,180),'a clip'), '+ σε':((190,90),'noise'), 'G':((330,90),'one forward'), 'x̂₀':((470,90),'its guess'),
    'leaf':((600,90),'the cut'), '+ σ′ε′':((740,90),'fresh noise'), '+ σ′ε″':((330,270),'fresh noise'),
    'encoder':((880,90),'frozen'), 'encoder ':((600,270),'no graph'), 'heads':((1020,180),'trained'),
    'G’s loss':((1170,90),'hinge, recon.'), 'D’s loss':((1170,270),'hinge, R1')}
FORWARD = [('x₀','+ σε'), ('+ σε','G'), ('G','x̂₀'), ('leaf','+ σ′ε′'), ('+ σ′ε′','encoder'), ('encoder','heads'),
    ('x₀','+ σ′ε″'), ('+ σ′ε″','encoder '), ('encoder ','heads'), ('heads','G’s loss'), ('heads','D’s loss')]
BACK = { # path of a gradient → its name, where the name stands
    'M1140 68 C1040 30 700 30 604 68':('3.  G’s gradient, through heads and frozen encoder to the leaf', (872,32)),
    'M596 68 C560 40 380 40 334 68':('4.  … and once through G', (465,36)),
    'M1112 282 C1062 282 1032 250 1024 204':('3.  D’s gradient stops at the heads', (985,298))}


def step():
    "One step of SF-V: forward in blue, gradients in orange"
    forward = [arrow(STEP[a][0], STEP[b][0], SW, SH, '', 'forward') for a,b in FORWARD]
    back = [line_of(d, 'mine', 'stroke-dasharray="6 3" ') for d in BACK]
    names = [label(*at, text) for text,at in BACK.values()]
    cut = '<path d="M535 64 L535 116" stroke="#111827" stroke-width="3"/>' + label(535, 134, 'detach', colour=INK)
    boxes = [box(at, SW, SH, name in ('G','heads'), name.strip(), words) for name,(at,words) in STEP.items()]
    key = label(60, 280, 'forward', colour=BLUE) + label(60, 298, 'gradient')
    return svg(1240, 315, [*forward, *back, *boxes, cut, *names, key])


# our clip -----------------------------------------------------------------------------------------

def our_clip(notebook):
    "Kind and bytes of the picture that the section `Our clip` of an executed chapter shows"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    start = next(i for i,o in enumerate(cells) if '## Our clip' in ''.join(o['source']))
    shown = [o['data'] for c in cells[start:] for o in c.get('outputs',()) if 'data' in o]
    kind,data = next((k,o[f'image/{k}']) for o in shown for k in ('gif','png') if f'image/{k}' in o)
    return kind,base64.b64decode(data)


def clips():
    "File → bytes, of all chapters but the last"
    chapters = sorted(IMAGES.parent.glob('0[0-5]_*.ipynb'))
    return {IMAGES/f'clip-{o.name[:2]}.{kind}':data for o in chapters for kind,data in [our_clip(o)]}


def main():
    drawn = {IMAGES/f'way-{o.split()[0]}.svg':way(o) for o in BOXES} | {IMAGES/'step.svg':step()}
    pictures = {o:text.encode() for o,text in drawn.items()} | clips()
    stale = [o for o,data in pictures.items() if not o.exists() or o.read_bytes()!=data]
    if '--check' in sys.argv[1:]:
        names = ', '.join(o.name for o in stale)
        sys.exit(f"{names}: not current; run python docs/make_maps.py" if stale else 0)
    for o in stale: o.write_bytes(pictures[o])


if __name__=='__main__': main()
