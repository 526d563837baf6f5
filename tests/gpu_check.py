"""What a GPU does with SVD at its true width: eight minutes, no network, random weights.

    python tests/gpu_check.py [-o gpu.json] [--height 448] [--width 768] [--cpu]

Measures a bf16 LoRA step (forward, backward, both optimisers), its use of flash attention, FLOP utilisation and peak memory beside `plan`'s, one step of
sampling beside 25, with `torch.compile` and without. `--cpu` runs the same lines on the small relative, but for the compiler, so that they are known to run."""
import argparse, json, time
from pathlib import Path
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from sfv_lite.plan import GPUS, random_batch, flops_of, memory_of
from sfv_lite.recipe import Recipe
from sfv_lite.sampling import fastest, sample_euler, sample_once
from sfv_lite.edm import karras_sigmas
from sfv_lite.svd import Denoiser, svd_pipeline, svd_sizes
from sfv_lite.train import State, distil_step, make_accelerator


def training(pipe, recipe, sizes, gpu:bool)->dict:
    "Step time, utilisation, memory, kernels of attention"
    acc = make_accelerator(recipe)
    pipe.unet.to(acc.device)
    s = State.create(pipe, recipe, acc)
    batch = random_batch(sizes, recipe, 1).to(acc.device)
    if gpu: torch.cuda.reset_peak_memory_stats()
    for _ in range(2): distil_step(s, batch)
    peak = torch.cuda.max_memory_allocated() if gpu else None
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen: distil_step(s, batch)
    seconds = fastest(lambda: distil_step(s, batch), 3)
    names = sorted({o.key for o in seen.key_averages() if any(k in o.key.lower() for k in ('flash','fmha','scaled_dot_product'))})
    flops = flops_of(recipe, sizes)
    return dict(seconds=seconds, tflop=flops/1e12, tflop_a_second=flops/seconds/1e12, attention_kernels=names, flash=any('flash' in o.lower() for o in names), peak=peak, planned=memory_of(recipe, sizes, gpu=gpu)['peak'])


def sampling(pipe, recipe, sizes, gpu:bool)->dict:
    "Seconds of one and of 25 guided steps, compiled and not"
    device,dtype = ('cuda',torch.bfloat16) if gpu else ('cpu',torch.float32)
    D,b = Denoiser(pipe.unet.to(device, dtype)).eval(),random_batch(sizes, recipe, 1).to(device)
    once = lambda: sample_once(D, b.cond, b.latents)
    found = dict(one_step=fastest(once, 3), steps_25=fastest(lambda: sample_euler(D, b.cond, b.latents, karras_sigmas(25).flip(0), torch.linspace(1, 3, recipe.frames)), 1))
    if gpu:
        with sdpa_kernel(SDPBackend.MATH): found['one_step_without_flash'] = fastest(once, 1)
        start = time.perf_counter()
        try:
            pipe.unet.compile()
            once()
            found |= dict(compiling=time.perf_counter()-start, one_step_compiled=fastest(once, 3))
        except Exception as e: found['compile_failed'] = str(e)[:200] # a machine without a compiler says so, and the rest stands
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-o', '--out', type=Path, default='gpu.json')
    p.add_argument('--height', type=int, default=448)
    p.add_argument('--width', type=int, default=768)
    p.add_argument('--cpu', action='store_true')
    a = p.parse_args()
    gpu,start = not a.cpu,time.perf_counter()
    if gpu and not torch.cuda.is_available(): raise SystemExit('gpu_check: PyTorch sees no GPU here; --cpu runs the same lines small')
    sizes = svd_sizes(small=a.cpu)
    h,w = (a.height,a.width) if gpu else (64,64)
    recipe = Recipe.load('svd-lora', height=h, width=w, batch=1, accumulation=1, precision='bf16' if gpu else 'no', **({} if gpu else dict(lora_rank=4)))
    found = dict(device=torch.cuda.get_device_name() if gpu else 'cpu', torch=torch.__version__, height=h, width=w)
    if gpu: torch.set_default_device('cuda') # weights are drawn there, in seconds
    pipe = svd_pipeline(small=a.cpu)
    torch.set_default_device('cpu')
    found['sampling'] = sampling(pipe, recipe, sizes, gpu)
    del pipe
    if gpu: torch.set_default_device('cuda')
    pipe = svd_pipeline(small=a.cpu)
    torch.set_default_device('cpu')
    found['training'] = training(pipe, recipe, sizes, gpu) | dict(known_peaks_tflop_a_second={k:v for k,(_,v) in GPUS.items()})
    found['seconds'] = time.perf_counter()-start
    a.out.write_text(json.dumps(found, indent=1)+'\n')
    print(json.dumps(found, indent=1))


if __name__=='__main__': main()
