"More than one process, in float64: two of them, each with half of every batch, are one with all of it; queues"
import os, signal, subprocess, time
import pytest, torch
from conftest import ROOT, TINY, files, python, sets
from safetensors.torch import load_file
from sfv_lite.export import export
from sfv_lite.pipelines import load_pipeline, save_pipeline
from sfv_lite.recipe import Recipe, RecipeError
from sfv_lite.svd import digits_pipeline

# every process draws noise for the whole batch and takes its own clips, so that one and two of them see the same
SCRIPT = '''if 1:
    import os, sys, torch, torch.distributed as dist
    from types import SimpleNamespace
    from safetensors.torch import save_file
    torch.set_default_dtype(torch.float64)
    from sfv_lite import fit, parts, sfv, train
    from sfv_lite.edm import add_noise
    from sfv_lite.recipe import Recipe
    from sfv_lite.svd import Batch, Condition, digits_pipeline
    out,overrides,steps,size,frames = sys.argv[1],eval(sys.argv[2]),int(sys.argv[3]),4,3
    r = Recipe.load('digits', **overrides)
    fit.BACKEND = 'aot_eager' # the graphs, without minutes of fusing
    acc = train.make_accelerator(r)
    rank,world = acc.process_index,acc.num_processes
    pipe = digits_pipeline(3)
    for net in (pipe.unet,pipe.vae): net.double()
    s = train.make_state(pipe, r, acc)
    part,g,laws = size//world//r.accumulation,torch.Generator(),dict(sigma_g=s.sigma_g, sigma_d=s.sigma_d)
    for micro in range(steps*r.accumulation):
        step,i = divmod(micro, r.accumulation)
        g.manual_seed(step)
        latents,pictures = torch.randn(size,frames,4,8,8, generator=g),torch.randn(size,4,8,8, generator=g)
        embeds,ids = torch.randn(size,1,64, generator=g),torch.tensor([[6.,127.,.02]]*size)
        whole = Batch(latents, Condition(pictures, embeds, ids))
        draws = [torch.randn(whole.latents.shape, generator=g) for _ in range(3)]
        levels = {k:o.sample(size, g).double() for k,o in laws.items()}
        mine = slice((i*world+rank)*part, (i*world+rank+1)*part)
        noise = iter(draws)
        sfv.add_noise = lambda x, sigma, _: add_noise(x, sigma, next(noise)[mine])
        law = lambda drawn: SimpleNamespace(sample=lambda n, g: drawn[mine])
        s.sigma_g,s.sigma_d = law(levels['sigma_g']),law(levels['sigma_d'])
        train.distil_step(s, whole[mine])
    assert s.step==steps
    G = acc.unwrap_model(s.G)
    found = {f'G.{k}':p for k,p in G.named_parameters() if p.requires_grad}
    average = {f'ema.{k}':v for k,v in zip([*found], parts.whole(s.ema.shadow_params, [*found.values()]))}
    found = {k:p.full_tensor() if hasattr(p, 'full_tensor') else p for k,p in found.items()}
    found |= {f'heads.{k}':p for k,p in s.D.heads.named_parameters()} | average
    save_file({k:v.detach().clone().contiguous() for k,v in found.items()}, f'{out}-{world}-{rank}.safetensors')
    if world>1: dist.destroy_process_group()
'''


HUGE = 'parts, recomputed','lora','compiled','parts, compiled'


@pytest.mark.slow
@pytest.mark.parametrize('way', ['whole', 'parts', *(pytest.param(o, marks=pytest.mark.huge) for o in HUGE)])
def test_two_processes_are_one(way, tmp_path):
    """Twenty steps with R1, a head start, accumulation and SM3; eight with a generator in parts (FSDP 2); six of AdamW
    so, clipped, where blocks are computed twice and the CPU keeps the average; six with LoRA, blocks computed twice;
    four whose blocks are compiled, whole and in parts:
    every tensor of G, of the heads and of the average equals the single process's to 1e-6 of its norm,
    and the ranks hold the same to the bit"""
    whole = dict(optimizer='sm3', T_g=4, lam=.1, lr_g=1e-4, lr_d=1e-3)
    lora = dict(lora_rank=4, checkpointing=True, lr_g=1e-3, lr_d=1e-3)
    parts = whole | dict(fsdp=True)
    again = parts | dict(checkpointing=True, clip_norm=.5, optimizer='adamw', ema_on_cpu=True)
    steps,more = {'whole':(20,whole), 'parts':(8,parts), 'parts, recomputed':(6,again), 'lora':(6,lora),
        'compiled':(4,whole | dict(compile=True)), 'parts, compiled':(4,parts | dict(compile=True))}[way]
    keys = dict(precision='no', steps=steps, head_start=2, warmup=0, schedule='constant', batch=4, accumulation=2,
        r1_every=3, head_width=16, **more)
    (tmp_path/'run.py').write_text(SCRIPT)
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node')
    for n in (1,2):
        done = python(*torchrun, n, tmp_path/'run.py', tmp_path/'w', repr(keys), steps)
        assert done.returncode==0, done.stderr[-3000:]
    one,first,second = (load_file(tmp_path/f'w-{o}.safetensors') for o in ('1-0','2-0','2-1'))
    assert all(torch.equal(first[k], v) for k,v in second.items() if v.numel()) # the average is the first one's
    assert sum(v.numel()>0 for v in second.values())>.5*len(second)
    assert all(o.dtype==torch.float64 for o in one.values())
    apart = {k:float((first[k]-v).norm()/v.norm()) for k,v in one.items()}
    assert max(apart.values())<1e-6, sorted(apart.items(), key=lambda o: -o[1])[:5]


@pytest.mark.slow
def test_a_run_in_parts_goes_on(tmp_path):
    """A generator that two processes share, stopped after step 3 and gone on with: the bytes of a run that was not
    stopped, whole in one pipeline. One process exports what a stopped run has; a teacher is trained so as well"""
    base = save_pipeline(digits_pipeline(4), tmp_path/'base')
    (tmp_path/'two.py').write_text("""if 1:
        import os, signal, sys
        from sfv_lite import train
        from sfv_lite.recipe import Recipe
        base,out,overrides,stop,resume,train_it = map(eval, sys.argv[1:])
        def data(*args):
            for k,batch in enumerate(train.digit_batches(*args)):
                if k==stop and args[3].process_index==1: os.kill(os.getpid(), signal.SIGTERM)
                yield batch
        r = Recipe.load('digits', **overrides)
        assert train.make_accelerator(r).num_processes==2
        run = dict(pretrain=train.pretrain, distil=train.distil)[train_it]
        try: run(r, out, base=base, data=data, resume=resume)
        except KeyboardInterrupt as e: print(e)""")
    keys = TINY | dict(steps=5, teacher_steps=3, head_start=1, batch=4, optimizer='sm3', fsdp=True, validate_every=2)
    def run(name, stop=None, resume=False, verb='distil'):
        torchrun = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2
        given = str(base),str(tmp_path/name),keys,stop,resume,verb
        done = python(*torchrun, tmp_path/'two.py', *map(repr, given))
        assert done.returncode==0, done.stderr[-3000:]
        return tmp_path/name
    weights = lambda folder: files(folder/'pipeline'/'unet')
    whole,part = run('whole'),run('part', stop=2)
    assert not (part/'pipeline').exists() and len(list((part/'state'/'000003').glob('optimizer*')))==3
    load_pipeline(export(part, tmp_path/'exported'))
    assert weights(run('part', resume=True))==weights(whole)!=weights(run('teacher', verb='pretrain'))
    assert files(part/'averages')==files(whole/'averages')
    stock = {k:v.shape for k,v in load_pipeline(base).unet.state_dict().items()}
    for o in ('whole','teacher'):
        assert {k:v.shape for k,v in load_pipeline(tmp_path/o).unet.state_dict().items()}==stock


def test_told_to_stop_by_a_queue(tmp_path):
    "nodes.sh, with stand-ins for Slurm's commands: told that time is short, it stops the run and queues itself again"
    said,here = tmp_path/'said',tmp_path/'bin'
    here.mkdir()
    stand_ins = dict(scontrol=f'[ "$1" = show ] && echo node1 || echo "$*" >> {said}', scancel=f'''
        echo "$*" >> {said}; kill -TERM $(cat {tmp_path}/pid)''', srun=f'''
        trap 'echo "saved" >> {said}; exit 130' TERM
        echo "$*" > {tmp_path}/line; echo $$ > {tmp_path}/pid
        while true; do sleep .1; done''')
    for name,code in stand_ins.items():
        (here/name).write_text('#!/bin/bash\n'+code)
        (here/name).chmod(0o755)
    slurm = dict(SLURM_JOB_ID='7', SLURM_JOB_NODELIST='')
    env = os.environ | slurm | dict(PATH=f'{here}:{os.environ["PATH"]}')
    script = ROOT/'nbs/tutorials/launch/nodes.sh'
    p = subprocess.Popen(['bash', str(script)], env=env)
    while not (tmp_path/'pid').exists(): time.sleep(.05)
    p.send_signal(signal.SIGUSR1)
    p.wait(20)
    assert said.read_text().split('\n')[:3]==['--signal=TERM 7.0','saved','requeue 7']
    assert 'RANK=$SLURM_PROCID' in (line := (tmp_path/'line').read_text()) and 'distil --resume' in line


@pytest.mark.slow
@pytest.mark.parametrize('name', ['one_gpu','eight_gpus'])
def test_configurations_start_a_run(name, tmp_path):
    "The files in launch/, by accelerate's own command, on this CPU and in one process"
    config,out = ROOT/'nbs/tutorials/launch'/f'{name}.yaml',tmp_path/'run'
    launch = 'accelerate.commands.launch', '--config_file', config, '--cpu', '--num_processes', 1
    base = save_pipeline(digits_pipeline(4), tmp_path/'base')
    keys = TINY | dict(steps=2, clips=4, batch=2, precision='bf16') # as the file says
    done = python('-m', *launch, '-m', 'sfv_lite', 'distil', '--base', base, '-o', out, *sets(**keys))
    assert done.returncode==0 and (out/'pipeline'/'model_index.json').exists(), done.stderr[-2000:]


def test_parts_and_additions():
    "LoRA's frozen UNet is no matter for FSDP: asked for both, a recipe says which to leave"
    with pytest.raises(RecipeError, match='set fsdp = false, or'): Recipe.load('svd', fsdp=True, lora_rank=4)
