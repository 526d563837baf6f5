"""The runs behind the tables of notebook 24: every row, three seeds, the same exam.
What is done is skipped, what was stopped goes on.

    python nbs/experiments/tables.py FOLDER [--only ROW …] [--seeds 0 1 2] [--base digits-teacher] [--clips 2048]

Runs and encoded clips lie in FOLDER (a few GB); figures in nbs/experiments/results, one small file a measurement.
Two processes, each with its own seeds, may share FOLDER:
`OMP_NUM_THREADS=1 taskset -c 0 python … --seeds 0` beside `… -c 1 … --seeds 1 2`."""
import argparse, functools, json, os, statistics
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sfv_lite.baselines import LADD, consistency, teachers_clips
from sfv_lite.digits import digit_batches, digit_clips
from sfv_lite.evaluate import Exam, Way, make_clips
from sfv_lite.files import read_rows, save_clip, write_text
from sfv_lite.recipe import Recipe
from sfv_lite.svd import Batch, Condition
from sfv_lite.train import distil
from sfv_lite.video import labelled, moving_digits

RESULTS = Path(__file__).parent/'results'
ROWS = { # name → what it changes in [digits], and how often its student is asked
    'sf-v':({}, (1,)), 'ladd':(LADD | dict(clips=4096), (1,)), 'consistency':({}, (8,4,2,1)),
    'spatial only':(dict(temporal=False), (1,)), 'temporal only':(dict(spatial=False), (1,)),
    'p_mean -2':(dict(P_mean=-2.), (1,)), 'p_mean 0':(dict(P_mean=0.), (1,)), 'p_mean 1':(dict(P_mean=1.), (1,))}
TEACHER = [(steps,guidance) for steps in (25,16,8,4,2,1) for guidance in (1.,2.)]


def remembered(clips, folder:Path):
    "`clips` that encode (or sample) once and read afterwards; all seeds share the same clips"
    def read(pipe, recipe, n, seed):
        file = folder/f'{seed%1_000_003}-{n}.safetensors'
        if not file.exists():
            b = clips(pipe, recipe, n, seed%1_000_003)
            part = file.with_suffix(f'.{os.getpid()}')
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k:v.contiguous() for k,v in dict(latents=b.latents, **vars(b.cond)).items()}, part)
            os.replace(part, file)
        o = load_file(file)
        return Batch(o.pop('latents'), Condition(**o))
    return read


def train(name:str, seed:int, folder:Path, base:str)->Path:
    "One run, from where it is"
    recipe = Recipe.load('digits', seed=seed, precision='no', **ROWS[name][0])
    out = folder/f'{name} {seed}'.replace(' ','-')
    if (out/'pipeline').exists(): return out/'pipeline'
    if name=='ladd': clips = remembered(teachers_clips(Way(base,25)), folder/'made')
    else: clips = remembered(digit_clips, folder/'real')
    run = consistency if name=='consistency' else distil
    return run(recipe, out, base, data=functools.partial(digit_batches, clips=clips), resume=out.exists())


def hinge(run:Path)->dict:
    "What D's hinge, real and fake together, came to at the end of a run with judges: 2 means that they guess"
    last = [o for o in read_rows(run/'log.csv')[-10:] if o.get('d_real')]
    return {'hinge':statistics.fmean(float(o['d_real'])+float(o['d_fake']) for o in last)} if last else {}


def wall(folder:Path, base:str)->Path:
    "The same six first frames as every model makes them move"
    real,_ = moving_digits(6, 10_001, 'test')
    student = lambda name, steps=1: Way(str(folder/f'{name}-0'/'pipeline'), steps, renoise=steps>1)
    ways = {'teacher, 25':Way(base,25), 'SF-V, 1':student('sf-v'), 'LADD, 1':student('ladd'),
        'consistency, 1':student('consistency'), 'consistency, 2':student('consistency',2)}
    made = {k:make_clips(way, real[:,0])[0] for k,way in ways.items()}
    return save_clip(labelled({'real':real} | made, scale=2), RESULTS.parents[1]/'images'/'race.gif')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--only', nargs='*', default=['teacher',*ROWS], choices=['teacher',*ROWS])
    p.add_argument('--seeds', nargs='*', type=int, default=[0,1,2])
    p.add_argument('--base', default='digits-teacher')
    p.add_argument('--clips', type=int, default=2048)
    a = p.parse_args()
    torch.backends.cudnn.allow_tf32 = False # the same arithmetic on every machine: fp32, `precision='no'`
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
    exams = functools.cache(lambda: Exam(a.clips))
    def measure(name, seed, way, folder=None):
        file = RESULTS/f'{name}-{way.calls}-{seed}.json'.replace(' ','-')
        if file.exists(): return
        if folder: way = Way(str(folder), way.steps, way.guidance, way.renoise)
        row,_ = exams().sit(way)
        if folder: row |= hinge(folder.parent)
        row |= {'clips by':name, 'steps':way.steps, 'guidance':way.guidance, 'seed':seed, 'device':device}
        write_text(file, json.dumps(row, indent=1)+'\n')
    if 'teacher' in a.only and 0 in a.seeds:
        for steps,guidance in TEACHER:
            name = 'teacher guided' if guidance>1 else 'teacher'
            measure(name, 0, Way(a.base, steps, guidance))
    for seed in a.seeds:
        for name in (o for o in ROWS if o in a.only):
            folder = train(name, seed, a.folder, a.base)
            for steps in ROWS[name][1]: measure(name, seed, Way(name, steps, renoise=steps>1), folder)
    if set(a.only)>=set(ROWS) and 0 in a.seeds: wall(a.folder, a.base)


if __name__=='__main__': main()
