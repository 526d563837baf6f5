"""What a GPU makes of SVD at its true width, lever by lever: random weights, no network, less than ten minutes.

    python tests/gpu_check.py [-o gpu.json] [--minutes 9] [--only LINE …] [--cpu]

Every line is written as soon as it is measured, and lines that a file has already are passed over, so a run that was
cut off goes on. Training lines are micro-batches of the package's own step, R1 and the optimisers with their share;
sampling lines one step and its decoding. `--cpu` runs all of them small, so that they are known to run.
Where the file of a card is whole it belongs into nbs/experiments/gpu/."""
import argparse, contextlib, gc, json, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch
import torch
from torch.profiler import ProfilerActivity, profile
from sfv_lite import fit, train
from sfv_lite.files import write_text
from sfv_lite.measure import fastest, timed
from sfv_lite.plan import flops_of, memory_of, random_batch
from sfv_lite.recipe import Recipe
from sfv_lite.runs import make_accelerator
from sfv_lite.sampling import sample_once
from sfv_lite.sfv import descend, distil_step
from sfv_lite.svd import Denoiser, decode, svd_pipeline, svd_sizes

NEVER = 10_000 # micro-batches a step, so that none ends while micro-batches are timed


def recipe_of(name:str, a, **keys):
    "A recipe at one clip a micro-batch; small for a CPU"
    size = dict(height=64, width=64, head_width=16) if a.cpu else {}
    if a.cpu and name=='svd-lora': size |= dict(lora_rank=4)
    return Recipe.load(name, precision='no' if a.cpu else 'bf16', head_start=0, **size | keys)


def planned(name:str, a, again:bool)->dict:
    "TFLOP a clip, and bytes, as `plan` counts them"
    r,sizes = recipe_of(name, a, batch=1, accumulation=1, checkpointing=again),svd_sizes(small=a.cpu)
    return dict(tflop=flops_of(r, sizes)/1e12, bytes=memory_of(r, sizes, gpu=not a.cpu)['peak'])


def machine(a)->dict:
    "The card, and what it does at best: TFLOP/s in half precision products, TB/s in copies"
    n,dtype = (512,torch.float32) if a.cpu else (8192,torch.bfloat16)
    x,y = torch.randn(n, n, device=a.device, dtype=dtype),torch.empty(n*n*8, device=a.device, dtype=dtype)
    product,copy = fastest(lambda: x@x, 10),fastest(lambda: y.clone(), 5)
    return dict(card=torch.cuda.get_device_name() if not a.cpu else 'cpu', torch=torch.__version__,
        product_tflops=2*n**3/product/1e12, copy_tb_s=2*y.nbytes/copy/1e12)


@contextlib.contextmanager
def without(short_cuts:bool, held:bool):
    "The package without some of its levers"
    same,nothing = (lambda o: o),(lambda *_: None)
    with contextlib.ExitStack() as stack:
        for module in (fit,train):
            if short_cuts: stack.enter_context(patch.object(module, 'take_short_cuts', same))
            if held: stack.enter_context(patch.object(module, 'hold_as_computed', nothing))
        yield


def pipeline(a):
    "Random weights, drawn where they are used; the other networks step aside on a GPU"
    gc.collect()
    with torch.device(a.device): pipe = svd_pipeline(small=a.cpu)
    for o in (pipe.vae,pipe.image_encoder): o.to('cpu')
    return pipe


def longest(f, a)->dict:
    "Launches, the time that kernels run, and the ten that take longest"
    kind = ProfilerActivity.CPU if a.cpu else ProfilerActivity.CUDA
    with profile(activities=[kind]) as seen: seconds = timed(f)
    took = lambda o: o.self_cpu_time_total if a.cpu else o.self_device_time_total
    rows = sorted((o for o in seen.key_averages() if took(o)>0), key=took, reverse=True)
    busy = sum(map(took, rows))/1e6
    return dict(launches=sum(o.count for o in rows), busy_seconds=busy, idle=max(0., 1-busy/seconds),
        longest=[[o.key[:90], o.count, round(took(o)/1e3, 2)] for o in rows[:10]])


def training(name:str, a, clips=1, again=True, compiled=False, profiled=False, stock=(), **keys)->dict:
    "Seconds a clip of a step: a micro-batch, its share of R1 and of both optimisers; the most memory"
    torch.compiler.reset()
    r = recipe_of(name, a, batch=clips*NEVER, accumulation=NEVER, checkpointing=again, compile=compiled, **keys)
    acc,share = make_accelerator(r),Recipe.load(name).batch
    with without('short cuts' in stock, 'held' in stock):
        pipe = pipeline(a)
        s = train.make_state(pipe, r, acc)
    batch = random_batch(svd_sizes(small=a.cpu), r, clips).to(acc.device)
    def micro(step):
        s.step = step # R1 is due at step 0
        distil_step(s, batch)
    if not a.cpu: torch.cuda.reset_peak_memory_stats()
    first = timed(lambda: micro(1))
    with_r1,plain = fastest(lambda: micro(0), 1),fastest(lambda: micro(1), 1 if a.cpu else 3)
    stepping = fastest(lambda: descend(s), 1)
    seconds = (plain + (with_r1-plain)/r.r1_every)/clips + stepping/share
    found = dict(seconds=seconds, micro_batch=plain, with_r1=with_r1, optimisers=stepping, first_call=first)
    if not a.cpu: found |= dict(bytes=torch.cuda.max_memory_allocated())
    return found | dict(clips=clips) | (longest(lambda: micro(1), a) if profiled else {})


@torch.no_grad()
def sampling(height:int, width:int, a, compiled=False)->dict:
    "Seconds of one step, and of decoding what it made"
    torch.compiler.reset()
    if a.cpu: height,width = 64,64
    pipe,dtype = pipeline(a),torch.float32 if a.cpu else torch.bfloat16
    unet,vae = (o.to(a.device, dtype).eval() for o in (pipe.unet,pipe.vae))
    for o in (unet,vae): fit.compile_blocks(o) if compiled else fit.take_short_cuts(o)
    r = Recipe.load('svd', height=height, width=width)
    D,b = Denoiser(unet),random_batch(svd_sizes(small=a.cpu), r, 1).to(a.device)
    first = timed(lambda: decode(vae, sample_once(D, b.cond, b.latents)))
    once,pixels = fastest(lambda: sample_once(D, b.cond, b.latents), 3),fastest(lambda: decode(vae, b.latents), 3)
    return dict(one_step=once, decoding=pixels, first_call=first)


LINES = {'machine':machine} | {name:partial(training, name.partition(':')[0], **how) for name,how in {
    'svd-lora: stock':dict(stock=('short cuts','held'), profiled=True), 'svd-lora: short cuts':dict(stock=('held',)),
    'svd-lora: frozen weights in bf16':{}, 'svd-lora: blocks kept':dict(again=False, profiled=True),
    'svd: blocks computed again':dict(profiled=True), 'svd-lora: two clips':dict(clips=2)}.items()} | {
    'sampling 448×768':partial(sampling, 448, 768), 'sampling 576×1024':partial(sampling, 576, 1024),
    'svd-lora: blocks kept, compiled':partial(training, 'svd-lora', again=False, compiled=True, profiled=True),
    'sampling 576×1024, compiled':partial(sampling, 576, 1024, compiled=True),
    'svd-lora: compiled':partial(training, 'svd-lora', compiled=True),
    'svd: compiled':partial(training, 'svd', compiled=True),
    'sampling 448×768, compiled':partial(sampling, 448, 768, compiled=True)}
PLANS = {f"{name}: {'computed again' if again else 'kept'}, planned":partial(planned, name, again=again)
    for name in ('svd-lora','svd') for again in (True,False)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', '--out', type=Path, default='gpu.json')
    p.add_argument('--minutes', type=float, default=9)
    p.add_argument('--only', nargs='*', default=[*LINES,*PLANS], choices=[*LINES,*PLANS])
    p.add_argument('--cpu', action='store_true')
    a,start = p.parse_args(),time.perf_counter()
    if not a.cpu and not torch.cuda.is_available():
        raise SystemExit('gpu_check: PyTorch sees no GPU here; --cpu runs the same lines small')
    a.device = 'cpu' if a.cpu else 'cuda'
    if a.cpu: fit.BACKEND = 'aot_eager' # a CPU's compiler takes minutes
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    def note(name, what):
        found[name] = what
        write_text(a.out, json.dumps(found, indent=1)+'\n')
        shown = {k:round(v, 4) if isinstance(v, float) else v for k,v in what.items() if k!='longest'}
        print(f'{time.perf_counter()-start:6.0f} s  {name}', shown, flush=True)
    due = [o for o in a.only if o not in found]
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as other: # the CPU counts meanwhile
        plans = {o:other.submit(PLANS[o], a) for o in due if o in PLANS}
        for name in (o for o in due if o in LINES):
            if time.perf_counter()-start>60*a.minutes:
                print(f'{name}: no time left')
                break
            try: note(name, LINES[name](a))
            except Exception as e: note(name, dict(failed=f'{type(e).__name__}: {str(e)[:300]}'))
            gc.collect()
            if not a.cpu: torch.cuda.empty_cache()
        for name,o in plans.items():
            if time.perf_counter()-start<60*a.minutes: note(name, o.result())
            else: o.cancel()


if __name__=='__main__': main()
