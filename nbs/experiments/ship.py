"""Three finished runs become the shipped weights; then their figures become model cards.

    python nbs/experiments/ship.py weights RUNS   # RUNS holds vae/, teacher/, student/:
                                                  # → sfv_lite/weights, experiments/logs
    sfv-lite evaluate … -o nbs/experiments/shipped # the command stands in notebook 23
    python nbs/experiments/ship.py cards          # → a README.md beside each pipeline"""
import csv, json, sys
from pathlib import Path
import torch
from sfv_lite.evaluate import brief
from sfv_lite.files import table
from sfv_lite.pipelines import WEIGHTS, load_pipeline, save_pipeline

HERE = Path(__file__).parent
CARD = '''# {name}

{what} A stock `StableVideoDiffusionPipeline` folder in fp16, made for sfv_lite: \
8 frames of 32×32 pixels, latents 4×8×8.

## Made by

```sh
{command}
```

{seconds}
The decoder of its VAE was then trained on, its encoder held: `python nbs/experiments/decoder.py FOLDER`.

## Figures

{clips} clips of held-out digits (scikit-learn's last 297), each from its first frame; `sfv-lite evaluate`, notebook 23.
Excess is the Fréchet distance over that of real clips; \
speed, straightness, spread, sharpness and diversity are ratios to real clips; frozen and read are shares.

{table}

## Limits

- Knows one digit on black, 24 pixels wide, moving at ¼ to 1 pixel a frame; \
anything else comes out as something like that.
- The image tower is random and says little; the picture reaches the network through its latents.
{limits}
'''

TWICE = ('Its first 2,700 steps were a run of their own, on 12,288 and then 4,096 clips; '
    'that run went on with the schedule and the clips of 7,000 steps.')
MACHINE = 'one slow AMD EPYC with two cores and no AVX-512, fp32, November 2026; other work beside it'


def weights(runs:Path):
    for name,run in {'digits-teacher':'teacher','digits':'student'}.items():
        save_pipeline(load_pipeline(runs/run), WEIGHTS/name, torch.float16)
    (HERE/'logs').mkdir(exist_ok=True)
    for run in ('vae','teacher','student'):
        rows = list(csv.DictReader((runs/run/'log.csv').open(newline='')))
        few = rows[::max(1,len(rows)//150)] + ([rows[-1]] if (len(rows)-1)%max(1,len(rows)//150) else [])
        with (HERE/'logs'/f'{run}.csv').open('w', newline='') as f:
            out = csv.DictWriter(f, rows[0] if len(rows[0])>len(rows[-1]) else rows[-1], lineterminator='\n')
            out.writeheader()
            out.writerows({k:v if k=='step' or not v else f'{float(v):.5g}' for k,v in o.items()} for o in few)


def cards():
    shipped = json.loads((HERE/'shipped'/'table.json').read_text())
    last = {o: list(csv.DictReader((HERE/'logs'/f'{o}.csv').open(newline='')))[-1] for o in ('vae','teacher','student')}
    def told(run, what):
        minutes = float(last[run]['seconds'])/60
        return f"{what}: {last[run]['step']} steps, {minutes:.1f} minutes ({MACHINE})."
    rows = lambda *names: table([brief(o) for o in shipped['rows'] if o['clips by'].split('@')[0] in names])
    def write(name, **kw):
        card = CARD.format(name=name, clips=shipped['clips'], **kw)
        (WEIGHTS/name/'README.md').write_text(card, encoding='utf-8')
    write('digits-teacher',
        what="The teacher: Stable Video Diffusion with small numbers, trained from nothing by the EDM loss.",
        command='sfv-lite vae      -o runs/vae\nsfv-lite pretrain -o runs/teacher --base runs/vae',
        seconds=told('vae','VAE')+'\n'+told('teacher','UNet')+'\n'+TWICE,
        table=rows('digits-teacher'),
        limits="- One step of it is a blur: that is what the student is for.")
    write('digits',
        what="The student: one network evaluation makes the clip (SF-V).",
        command='sfv-lite distil -o runs/student --base digits-teacher',
        seconds=told('student','Student'),
        table=rows('digits','digits-teacher'),
        limits="- Made for one step and for nothing else.")


if __name__=='__main__':
    if sys.argv[1:2]==['weights'] and len(sys.argv)==3: weights(Path(sys.argv[2]))
    elif sys.argv[1:]==['cards']: cards()
    else: sys.exit(__doc__)
