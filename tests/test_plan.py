"What `plan` counts, against what fresh processes take"
import dataclasses, json
from pathlib import Path
import pytest, torch
from accelerate import PartialState
from conftest import python, recipe, sfv
from sfv_lite.cli import main
from sfv_lite.files import write_rows
from sfv_lite.runs import make_accelerator
from sfv_lite.measure import count_flops
from sfv_lite.pipelines import load_pipeline
from sfv_lite.plan import blind_step, random_batch, flops_of, memory_of, most_clips, network_sizes, shard_bytes
from sfv_lite.recipe import Recipe
from sfv_lite.train import make_state
from sfv_lite.svd import svd_sizes

PROCESS = '''if 1:
    import gc, re, sys, torch
    from types import SimpleNamespace
    from sfv_lite.runs import make_accelerator
    from sfv_lite.plan import random_batch
    from sfv_lite.recipe import Recipe
    from sfv_lite.sfv import distil_step
    from sfv_lite.train import make_state
    from sfv_lite.svd import networks
    torch.set_num_threads(1)
    sizes,r = eval(sys.argv[1]),Recipe(**eval(sys.argv[2]))
    read = lambda k: int(re.search(k + r':\\s+(\\d+)', open('/proc/self/status').read())[1])*1024
    def state(**change): # VAE and tower are not trained and not counted
        pipe = SimpleNamespace(unet=networks(**(sizes | dict(unet=sizes['unet'] | change)))['unet'])
        return make_state(pipe, r, make_accelerator(r))
    # a small one first, so that all libraries are loaded and warm
    s = state(block_out_channels=(32,)*4, num_attention_heads=1)
    for _ in range(r.accumulation): distil_step(s, random_batch(sizes, r, r.batch//r.accumulation))
    del s
    gc.collect()
    before = read('VmRSS')
    open('/proc/self/clear_refs', 'w').write('5') # the highest so far is forgotten
    s = state()
    batch = random_batch(sizes, r, r.batch//r.accumulation)
    for _ in range(2*r.accumulation): distil_step(s, batch)
    assert s.step==2
    print(read('VmHWM')-before)
'''


def sizes(*widths):
    "SVD's UNet at other widths; what is beside it is small"
    change = dict(block_out_channels=widths, num_attention_heads=[o//32 for o in widths], cross_attention_dim=64)
    return svd_sizes(small=True) | dict(unet=svd_sizes()['unet'] | change)


CASES = { # widths, what changes; the large ones take 2 to 5 GB and minutes
    'small':((64,128,256,256), dict(height=64, width=64, optimizer='sm3', accumulation=1)),
    'weights':((128,256,512,512), dict(height=64, width=64, optimizer='sm3', accumulation=2)),
    'activations':((96,192,384,384), dict(height=128, width=192, optimizer='sm3', accumulation=1)),
    'lora':((192,384,768,768), dict(height=64, width=64, lora_rank=16, accumulation=2, checkpointing=True))}


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason="the peak of resident memory is read from /proc")
@pytest.mark.parametrize('case', [
    pytest.param(o, marks=[pytest.mark.slow]+[pytest.mark.huge]*(o!='small')) for o in CASES])
def test_memory_is_what_a_process_takes(case, tmp_path):
    """Two optimiser steps of UNets of 0.06 to 0.5 billion weights:
    the highest resident memory of a fresh process is within 10 % of the plan.
    (glibc is asked to give freed memory back;
    by itself it keeps a few hundred MB of fragments, of which a plan knows nothing.)"""
    widths,keys = CASES[case]
    plain = dict(precision='no', lora_rank=0, checkpointing=False, head_start=0, r1_every=1, head_width=64)
    r = dataclasses.replace(Recipe.load('svd-lora', **(plain | keys)), batch=keys['accumulation'])
    (tmp_path/'run.py').write_text(PROCESS)
    argv = (tmp_path/'run.py', repr(sizes(*widths)), repr(dataclasses.asdict(r)))
    glibc = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    done = python(*argv, timeout=900, env=glibc)
    assert done.returncode==0, done.stderr[-3000:]
    took,counted = int(done.stdout),memory_of(r, sizes(*widths), gpu=False)
    print(case, f'{took/2**30:.2f} GB taken', {k:f'{v/2**30:.2f}' for k,v in counted.items()})
    assert (counted['peak']>2e9 or case=='small') and abs(counted['peak']/took-1)<.1, (took, counted)


def test_flops_are_those_of_a_real_step(base):
    "Counted on fake tensors, the step of digits costs what `count_flops` counts on real ones; R1 is in for its share"
    r = recipe(batch=1, r1_every=4)
    state = make_state(load_pipeline(base), r, make_accelerator(r))
    batch = random_batch(network_sizes(base), r, 1)
    def at(step):
        state.step = step
        return count_flops(lambda: blind_step(state, batch))
    full = flops_of(dataclasses.replace(r, batch=6), network_sizes(base))
    assert full==6*(at(0)+3*at(1))/4
    assert .3*full<flops_of(dataclasses.replace(r, batch=6), network_sizes(base), True)<.8*full # the judges alone


@pytest.mark.slow
def test_memory_is_planned_alike_where_there_is_a_gpu(base):
    """Fake tensors lie on the CPU and so must autocast's, whatever accelerate found;
    what accelerate knows of a run in the same process is left as it was"""
    r,state = recipe(batch=1, precision='bf16'),PartialState()
    expected,found = memory_of(r, network_sizes(base)),state.device
    try:
        state.device = torch.device('cuda')
        assert memory_of(r, network_sizes(base))==expected and state.device.type=='cuda'
    finally: state.device = found
    without = memory_of(dataclasses.replace(r, precision='no'), network_sizes(base))
    assert without['peak']!=expected['peak'] # so autocast is seen at all


@pytest.mark.slow
def test_plan_on_the_command_line(base, tmp_path):
    "Table, verdict and a file; more cards share the batch; a batch that they cannot share is refused"
    def ask(*more): return sfv('plan', '--recipe', 'digits', '--base', base, '-o', tmp_path/'plan.json', *more)
    done = ask('--gpu', 'l40s', '--gpus', 2)
    assert done.returncode==0, done.stderr
    p = json.loads((tmp_path/'plan.json').read_text())
    assert all(o in done.stdout for o in ('weights of G','peak','fits','TFLOP a step','days','a clip'))
    assert p['fits'] and p['gpus']==2
    for o in p['memory'].values(): assert o['peak']==sum(v for k,v in o.items() if k!='peak')
    assert p['clip']==shard_bytes(recipe(), network_sizes(base))
    done = ask('--gpus', 3)
    assert done.returncode==1 and len(done.stderr.splitlines())==1 and 'batch of 16' in done.stderr
    done = ask('--gpu', 'gt-710')
    assert done.returncode==1 and len(done.stderr.splitlines())==1 and 'a100-80' in done.stderr



@pytest.mark.slow
def test_a_run_says_what_it_gets_out_of_its_cards(base, tmp_path, monkeypatch, capsys):
    "Clips a second of its log times what the count says of a clip; the card by its name; blocks done again apart"
    import csv
    from sfv_lite import train
    from sfv_lite.kernels import achieved, said_of
    out = tmp_path/'run'
    r = recipe(steps=3, batch=2, checkpointing=True)
    train.distil(r, out, base=base)
    rates = sorted(float(o['clips_s']) for o in csv.DictReader((out/'log.csv').open(newline='')))
    here = achieved(out)
    assert here['clips_s']==rates[1] and here['share'] is None and 'TFLOP/s' in said_of(here)
    cost = {True:here['operations_s']/rates[1], False:here['useful_s']/rates[1]} # a clip's
    useful = flops_of(dataclasses.replace(r, checkpointing=False), network_sizes(base))/r.batch
    assert cost[False]==pytest.approx(useful) and cost[True]>1.1*useful
    asked = json.loads((out/'recipe.json').read_text())
    for name in ('NVIDIA A100-SXM4-80GB MIG 1g.10gb','NVIDIA A100-SXM4-80GB'): # a slice, and the card
        asked['made_with'][-1] |= dict(device=name, processes=2)
        (out/'recipe.json').write_text(json.dumps(asked))
        there = achieved(out)
        assert 'MIG' not in name or there['gpu'] is there['share'] is None
    assert there['gpu']=='a100-80' and there['share']==pytest.approx(here['operations_s']/(2*312e12))
    planned = {}
    monkeypatch.setattr('sfv_lite.plan.plan', lambda *a: planned.update(utilisation=a[4]) or planned)
    monkeypatch.setattr('sfv_lite.plan.verdict', lambda p: '')
    monkeypatch.setattr('sfv_lite.kernels.flops_of', lambda r, *_: r.batch*cost[r.checkpointing])
    assert main(['plan', '--recipe', 'digits', '--like', str(out), '-o', str(tmp_path/'plan.json')])==0
    assert planned['utilisation']==pytest.approx(there['share'])
    assert '2 × NVIDIA A100-SXM4-80GB' in capsys.readouterr().out
    assert main(['plan', '--like', str(out), '--utilisation', '.2', '-o', str(tmp_path/'p.json')])!=0
    log = (out/'log.csv').read_text()
    alone = [{k:v for k,v in o.items() if k!='adv'} for o in csv.DictReader(log.splitlines())]
    write_rows(out/'log.csv', alone) # as in a head start
    with pytest.raises(ValueError, match='a head start'): achieved(out)
    (out/'log.csv').unlink()
    with pytest.raises(ValueError, match='no clips_s of steps'): achieved(out)
    with pytest.raises(ValueError, match='no run of distil'): achieved(base)


@pytest.mark.parametrize('wrong', ['frames=80','height=40'])
def test_what_no_network_takes(base, wrong, tmp_path, capsys):
    "A size that `distil` would refuse is refused, by the plan and by the count"
    for verb in (['plan','--gpus','1'], ['bench','--fake']):
        asked = '--base', str(base), '--recipe', 'digits', '--set', wrong, '-o', str(tmp_path/'out.json')
        assert main([*verb, *asked])!=0 and f"recipe [digits] {wrong.replace('=', ' = ')}: " in capsys.readouterr().err


@pytest.mark.parametrize('again', [False,True])
def test_clips_at_once(base, again):
    "As many as were said fit, no more than divide the batch; and where there is no room for one, none"
    r,sizes = recipe(batch=24, accumulation=12, checkpointing=again),network_sizes(base)
    two = memory_of(r, sizes)
    one_more = two['activations, new gradients, temporaries']/2
    for room,most in ((two['peak']+6.5*one_more, 8), (two['peak']+.5*one_more, 2), (two['peak']-1.5*one_more, 0)):
        n = most_clips(two, 2, 24, room)
        assert n==most
        if n: assert memory_of(dataclasses.replace(r, accumulation=24//n), sizes)['peak']<=room


def test_eight_bits_are_counted_anywhere(base, monkeypatch):
    "The 8-bit AdamW is counted without bitsandbytes: a quarter of AdamW's state and a little"
    from sfv_lite import runs
    monkeypatch.setattr(runs, 'find_spec', lambda name: None)
    r,sizes = recipe(optimizer='adamw'),network_sizes(base)
    full,less = (memory_of(dataclasses.replace(r, optimizer=o), sizes) for o in ('adamw','adamw8bit'))
    assert less['state of the optimisers']==pytest.approx(.254*full['state of the optimisers'], rel=.01)
    assert less['peak']<full['peak'] and len({o['activations, new gradients, temporaries'] for o in (full,less)})==1


def test_held_weights_are_weights(base):
    "What is held in half precision stands under weights, at half the bytes, and is no copy of a step"
    r,sizes = recipe(lora_rank=2, precision='bf16'),network_sizes(base)
    held,full = memory_of(r, sizes),memory_of(dataclasses.replace(r, precision='no'), sizes)
    assert held['weights of G']<.6*full['weights of G'] and held['autocast copies']<.3*held['weights of G']


def test_shared_memory_is_counted(base):
    "Four processes that share G hold a quarter of what stands each, and gathered blocks; an average on the CPU is none"
    r,sizes = recipe(batch=4),network_sizes(base)
    whole,other = memory_of(r, sizes, 4),memory_of(dataclasses.replace(r, fsdp=True, ema_on_cpu=True), sizes, 4)
    assert other['weights of G']==whole['weights of G']//4 and other['average of G']==0<other['blocks gathered']
    assert other['peak']==sum(v for k,v in other.items() if k!='peak')
    held = 'state of the optimisers' # the judges' is not shared
    assert 4*other[held] > whole[held]+2*whole['heads']
    assert whole['peak']-other['peak']==sum(whole.get(k,0)-v for k,v in other.items() if k!='peak')
