"What `plan` counts, against what fresh processes take"
import dataclasses, json
import pytest
from conftest import python, recipe, sfv
from sfv_lite.plan import GPUS, flops_of, memory_of, plan, shard_bytes
from sfv_lite.recipe import Recipe, RecipeError
from sfv_lite.svd import svd_sizes

PROCESS = '''if 1:
    import re, sys, torch
    from types import SimpleNamespace
    from sfv_lite.plan import fake_batch
    from sfv_lite.recipe import Recipe
    from sfv_lite.svd import networks
    from sfv_lite.train import State, distil_step, make_accelerator
    torch.set_num_threads(1)
    sizes,r = eval(sys.argv[1]),Recipe(**eval(sys.argv[2]))
    high = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])*1024
    tiny = networks(**(sizes | dict(unet=sizes['unet'] | dict(block_out_channels=(32,32,32,32), num_attention_heads=1))))['unet'] # so that libraries are loaded
    acc = make_accelerator(r)
    del tiny
    before = high()
    small = dict(block_out_channels=(32,32,32,32), layers_per_block=1)
    s = State.create(SimpleNamespace(unet=networks(sizes['unet'], sizes['vae'] | small, sizes['image_encoder'] | dict(num_hidden_layers=1))['unet']), r, acc)
    batch = fake_batch(sizes, r, r.batch//r.accumulation)
    for _ in range(2*r.accumulation): distil_step(s, batch)
    assert s.step==2
    print(high()-before)
'''


def sizes(*widths):
    "SVD's UNet at other widths; what is beside it is small"
    o = svd_sizes(small=True)
    return o | dict(unet=svd_sizes()['unet'] | dict(block_out_channels=widths, num_attention_heads=(5,10,20,20), cross_attention_dim=64))


@pytest.mark.skipif('not __import__("pathlib").Path("/proc/self/status").exists()', reason="the peak of resident memory is read from /proc")
@pytest.mark.parametrize('case', ['weights','activations','lora'])
def test_memory_is_what_a_process_takes(case, tmp_path):
    "Two optimiser steps of UNets of 0.1 to 0.4 billion weights, more than 2 GB each: the highest resident memory is within 10 % of the plan"
    widths,keys = {'weights':((160,320,640,640), dict(height=64, width=64, optimizer='sm3', accumulation=2)), 'activations':((80,160,320,320), dict(height=128, width=192, optimizer='sm3', accumulation=1)),
        'lora':((160,320,640,640), dict(height=64, width=128, lora_rank=16, accumulation=2, checkpointing=True))}[case]
    r = dataclasses.replace(Recipe.load('svd-lora', **{**dict(precision='no', lora_rank=0, checkpointing=False, head_start=0, r1_every=1, head_width=64), **keys}), batch=keys['accumulation'])
    (tmp_path/'run.py').write_text(PROCESS)
    done = python(tmp_path/'run.py', repr(sizes(*widths)), repr(dataclasses.asdict(r)), timeout=600)
    assert done.returncode==0, done.stderr[-3000:]
    took,counted = int(done.stdout),memory_of(r, sizes(*widths), gpu=False)
    print(case, f'{took/2**30:.2f} GB taken', {k:f'{v/2**30:.2f}' for k,v in counted.items()})
    assert counted['peak']>2e9 and abs(counted['peak']/took-1)<.1, (took, counted)
