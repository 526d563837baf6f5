"""What a GPU does with SVD at its true width: a few minutes, no network, random weights.

    python tests/gpu_check.py [--recipe svd-lora] [-o gpu.json] [--height 448] [--width 768] [--cpu]

Measures bf16 training steps of one clip (forward, backward, both optimisers), their use of flash attention, FLOP
utilisation and peak memory beside `plan`'s, which another process works out meanwhile; then one step of sampling beside
25, with `torch.compile` and without. `--cpu` runs the same lines on the small relative, but for the compiler, so that
they are known to run."""
import argparse, gc, json, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from sfv_lite.edm import karras_sigmas
from sfv_lite.runs import make_accelerator
from sfv_lite.measure import fastest
from sfv_lite.plan import GPUS, random_batch, flops_of, memory_of
from sfv_lite.recipe import Recipe
from sfv_lite.sampling import sample_euler, sample_once
from sfv_lite.sfv import distil_step
from sfv_lite.svd import Denoiser, svd_pipeline, svd_sizes
from sfv_lite.train import make_state


def planned(recipe, small:bool, gpu:bool)->dict:
    "TFLOP a step, on average over steps with R1 and without, and bytes"
    sizes = svd_sizes(small=small)
    return dict(tflop=flops_of(recipe, sizes)/1e12, memory=memory_of(recipe, sizes, gpu=gpu))


def fresh_pipeline(small:bool, gpu:bool):
    "Random weights, drawn where they are used; the other networks step aside on a GPU"
    gc.collect()
    # set_default_device would slow each later call: 7 % of a step
    with torch.device('cuda' if gpu else 'cpu'): pipe = svd_pipeline(small=small)
    for o in (pipe.vae,pipe.image_encoder): o.to('cpu')
    return pipe


def training(pipe, recipe, sizes, gpu:bool)->dict:
    "Seconds of a step, on average over steps with R1 and without, peak memory, kernels of attention"
    acc = make_accelerator(recipe)
    pipe.unet.to(acc.device)
    s,batch = make_state(pipe, recipe, acc),random_batch(sizes, recipe, 1).to(acc.device)
    def steps(n=recipe.r1_every):
        for _ in range(n): distil_step(s, batch)
    if gpu: torch.cuda.reset_peak_memory_stats()
    steps()
    peak = torch.cuda.max_memory_allocated() if gpu else None
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen: steps(1)
    steps(recipe.r1_every-1) # so that the timing below holds every kind of step once
    attention = ('flash','fmha','scaled_dot_product')
    names = sorted({o.key for o in seen.key_averages() if any(k in o.key.lower() for k in attention)})
    flash = any('flash' in o.lower() for o in names)
    return dict(seconds=fastest(steps, 2)/recipe.r1_every, peak=peak, attention_kernels=names, flash=flash)


def sampling(pipe, recipe, sizes, gpu:bool)->dict:
    "Seconds of one and of 25 guided steps, compiled and not"
    device,dtype = ('cuda',torch.bfloat16) if gpu else ('cpu',torch.float32)
    D,b = Denoiser(pipe.unet.to(device, dtype)).eval(),random_batch(sizes, recipe, 1).to(device)
    def once(): return sample_once(D, b.cond, b.latents)
    def guided():
        sigmas,guidance = karras_sigmas(25).flip(0),torch.linspace(1, 3, recipe.frames)
        return sample_euler(D, b.cond, b.latents, sigmas, guidance)
    found = dict(one_step=fastest(once, 3), steps_25=fastest(guided, 1))
    if gpu:
        with sdpa_kernel(SDPBackend.MATH): found['one_step_without_flash'] = fastest(once, 1)
        start = time.perf_counter()
        try:
            pipe.unet.compile()
            once()
            found |= dict(compiling=time.perf_counter()-start, one_step_compiled=fastest(once, 3))
        except Exception as e: # a machine without a compiler says so, and the rest stands
            found['compile_failed'] = str(e)[:200]
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--recipe', choices=('svd-lora','svd'), default='svd-lora')
    p.add_argument('-o', '--out', type=Path, default='gpu.json')
    p.add_argument('--height', type=int, default=448)
    p.add_argument('--width', type=int, default=768)
    p.add_argument('--no-sampling', action='store_true')
    p.add_argument('--cpu', action='store_true')
    a = p.parse_args()
    gpu,small,start = not a.cpu,a.cpu,time.perf_counter()
    if gpu and not torch.cuda.is_available():
        raise SystemExit('gpu_check: PyTorch sees no GPU here; --cpu runs the same lines small')
    h,w = (a.height,a.width) if gpu else (64,64)
    precision,rank = 'bf16' if gpu else 'no',dict(lora_rank=4) if small and a.recipe=='svd-lora' else {}
    one = dict(height=h, width=w, batch=1, accumulation=1, head_start=0)
    recipe = Recipe.load(a.recipe, precision=precision, **one, **rank)
    device = torch.cuda.get_device_name() if gpu else 'cpu'
    found = dict(recipe=a.recipe, device=device, torch=torch.__version__, height=h, width=w)
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as other:
        plan,sizes = other.submit(planned, recipe, small, gpu),svd_sizes(small=small)
        found['training'] = training(fresh_pipeline(small, gpu), recipe, sizes, gpu)
        if not a.no_sampling: found['sampling'] = sampling(fresh_pipeline(small, gpu), recipe, sizes, gpu)
        found['planned'] = plan.result()
    found['training']['tflop_a_second'] = found['planned']['tflop']/found['training']['seconds']
    found |= dict(known_peaks_tflop_a_second={k:v for k,(_,v,_) in GPUS.items()}, seconds=time.perf_counter()-start)
    a.out.write_text(json.dumps(found, indent=1)+'\n')
    print(json.dumps(found, indent=1))


if __name__=='__main__': main()
