"""Whole runs: golden losses, frozen and averaged weights, accumulation, resuming, Ctrl-C

A change that is meant to move the losses: `pytest tests/test_train.py --regold` writes golden.json anew;
commit it with the change."""
import csv, dataclasses, json, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import load_file
from conftest import TINY, files, python, recipe, sets, sfv
from sfv_lite import train
from sfv_lite.checkpoint import sealed
from sfv_lite.cli import main
from sfv_lite.edm import add_noise
from sfv_lite.sfv import descend, learning
from sfv_lite.pipelines import load_pipeline, save_pipeline
from sfv_lite.svd import digits_pipeline, encode
from sfv_lite.video import moving_digits

GOLDEN = Path(__file__).with_name('golden.json')
TORCHRUN = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2


TIMES = 'seconds','data_s','step_s','look_s','clips_s'


def log(out):
    "The rows of a run's log.csv, but for what tells the time"
    rows = csv.DictReader((Path(out)/'log.csv').open(newline=''))
    return [{k:v for k,v in o.items() if k not in TIMES} for o in rows]


def weights(net):
    "Of a network what learns, of a frozen one all"
    return [p.detach().clone() for p in learning(net) or net.parameters()]


def same(a, b): return all(torch.equal(x,y) for x,y in zip(a, b, strict=True))


def new_state(pipe, **overrides):
    "A state of `distil` and a batch for it"
    r = recipe(**overrides)
    batch = encode(pipe, moving_digits(r.batch)[0], generator=torch.Generator().manual_seed(0))
    return train.make_state(pipe, r, train.make_accelerator(r)),batch


# golden losses ------------------------------------------------------------------------------------

RUNS = {'pretrain': dict(teacher_steps=10, teacher_lr=1e-3),
    'distil-adamw': dict(steps=10, optimizer='adamw', lr_g=1e-4, lr_d=1e-3, r1_every=4),
    'distil-sm3': dict(steps=10, optimizer='sm3', lr_g=1e-5, lr_d=1e-4, r1_every=4)}


@pytest.mark.parametrize('name', RUNS)
def test_golden_losses(name, tmp_path, request):
    """Ten steps from a seeded untrained pipeline give the committed losses:
    nobody changed the mathematics or the order of random draws unawares. The recipe is pinned in golden.json"""
    gold = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    regold = request.config.getoption('regold')
    pinned = {} if regold else gold[name]['recipe']
    r,folder = recipe(**{**dict(clips=64), **RUNS[name], **pinned}),save_pipeline(digits_pipeline(4), tmp_path/'base')
    if name=='pretrain': train.pretrain(r, tmp_path/'run', base=folder)
    else: train.distil(r, tmp_path/'run', folder)
    rows = log(tmp_path/'run')
    logged = [k for k in ('loss','d_real','d_fake','adv','recon','r1') if k in rows[0]]
    losses = {k:[float(o[k]) for o in rows if o[k]] for k in logged}
    if regold:
        gold[name] = dict(recipe={k:v for k,v in dataclasses.asdict(r).items() if k!='name'}, losses=losses)
        GOLDEN.write_text(json.dumps(gold, indent=1)+'\n')
        pytest.skip("golden.json written anew")
    assert losses.keys()==gold[name]['losses'].keys() and all(map(len, losses.values()))
    for k,v in losses.items(): assert v==pytest.approx(gold[name]['losses'][k], rel=1e-3, abs=1e-4), k


# one step -----------------------------------------------------------------------------------------

def gradients(monkeypatch, accumulation):
    """Gradients and weights of one step on four clips in so many micro-batches, in float64;
    clip i draws the same numbers in whatever micro-batch it comes"""
    pipe = digits_pipeline(5)
    state,batch = new_state(pipe, batch=4, accumulation=accumulation, r1_every=3, gamma=.5)
    state = train.make_state(pipe.to(dtype=torch.float64), state.recipe, state.accelerator)
    state.heads.double()
    batch,g,found = batch.to(torch.float64),torch.Generator().manual_seed(0),{}
    eps = torch.randn(3, *batch.latents.shape, generator=g, dtype=torch.float64)
    sigma_g,sigma_d = state.sigma_g.sample(4,g),state.sigma_d.sample(4,g)
    def look_then_descend(s):
        found.update({k:[p.grad.clone() for p in learning(o)] for k,o in dict(G=s.G, heads=s.heads).items()})
        return descend(s)
    law = lambda levels: SimpleNamespace(sample=lambda n, g: levels[clips])
    with monkeypatch.context() as m:
        m.setattr('sfv_lite.sfv.descend', look_then_descend)
        for clips in torch.arange(4).chunk(accumulation):
            assert not found, "stepped before the last micro-batch"
            draws = iter(eps)
            m.setattr('sfv_lite.sfv.add_noise', lambda x, sigma, _: add_noise(x, sigma, next(draws)[clips]))
            state.sigma_g,state.sigma_d = law(sigma_g),law(sigma_d)
            train.distil_step(state, batch[clips])
    assert state.step==1 and state.micro==accumulation
    return found,weights(state.G)+weights(state.heads)


def test_micro_batches_add_up(monkeypatch):
    """Two accumulated halves, or four quarters, give the gradients of G and of the heads, R1's included,
    and the weights that one batch gives; float64, so that nothing hides in the rounding"""
    found,after = gradients(monkeypatch, 1)
    assert all(max(o.abs().max() for o in found[k])>1e-4 for k in found)
    for accumulation in (2,4):
        other,then = gradients(monkeypatch, accumulation)
        for k in ('G','heads'): torch.testing.assert_close(other[k], found[k], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(then, after, rtol=0, atol=1e-8)


def test_frozen_is_frozen(pipe):
    """Steps, with R1 and without, move each weight of G that is read, and of the heads, and leave the eye as it was:
    no change, no gradient, no place in an optimiser"""
    state,batch = new_state(pipe, r1_every=2)
    nets = dict(eye=state.D.encoder, G=state.G, heads=state.heads)
    before = {k:weights(o) for k,o in nets.items()}
    buffers = {k:v.clone() for k,v in state.D.encoder.state_dict().items()}
    for _ in range(3): train.distil_step(state, batch)
    assert same(before['eye'], weights(state.D.encoder))
    assert all(torch.equal(v, buffers[k]) for k,v in state.D.encoder.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in state.D.encoder.parameters())
    stepped = {id(p) for opt in (state.opt_g,state.opt_d) for group in opt.param_groups for p in group['params']}
    assert not stepped & {id(p) for p in state.D.encoder.parameters()}
    assert stepped == {id(p) for k in ('G','heads') for p in learning(nets[k])}
    for k in ('G','heads'):
        assert not any(torch.equal(p, old) for p,old in zip(learning(nets[k]), before[k], strict=True)), k
    dead = [n for n,p in state.G.named_parameters() if not p.requires_grad]
    assert dead and all('attn2.to_q' in o or 'attn2.to_k' in o or 'norm2' in o for o in dead)


def test_ema_is_the_average(pipe):
    """After every step the shadow weights are d·shadow + (1−d)·G with diffusers' warm-up d = min(ema, (1+n)/(10+n)),
    n from 0, and d = 0 at first; they are not a copy of G"""
    state,batch = new_state(pipe, ema=.2)
    shadow = weights(state.G)
    for step in range(4):
        train.distil_step(state, batch)
        d = min(.2, (1+step)/(10+step)) if step else 0.
        shadow = [d*s + (1-d)*p for s,p in zip(shadow, weights(state.G), strict=True)]
        torch.testing.assert_close(list(state.ema.shadow_params), shadow, rtol=1e-5, atol=1e-7)
    apart = max((s-p).abs().max() for s,p in zip(state.ema.shadow_params, learning(state.G)))
    assert apart>1e-6


def test_head_start_leaves_G_alone(pipe):
    "During D's head start only the heads learn: G, its gradients and its average stay; then G joins in"
    state,batch = new_state(pipe, head_start=2)
    G,heads = weights(state.G),weights(state.heads)
    for _ in range(2):
        row = train.distil_step(state, batch)
        assert 'adv' not in row and all(p.grad is None or not p.grad.any() for p in state.G.parameters())
    assert same(G, weights(state.G)) and same(G, state.ema.shadow_params) and not same(heads, weights(state.heads))
    assert 'adv' in train.distil_step(state, batch)
    assert not same(G, weights(state.G)) and not same(G, state.ema.shadow_params)


# runs that are cut off ----------------------------------------------------------------------------

STEPS = dict(steps=4, head_start=2, save_every=3, accumulation=2,
    optimizer='sm3', lr_g=1e-4, lr_d=1e-3, schedule='cosine')


def states(out):
    "Steps of the states that a run keeps"
    return sorted(int(o.name) for o in (Path(out)/'state').iterdir())


def weights_on_disk(out):
    "Every tensor of a run's pipeline and of its newest state, by the name of its network and its own"
    last = f'{max(states(out)):06}'
    found = [o for o in sorted(Path(out).rglob('*.safetensors')) if 'pipeline' in o.parts or last in o.parts]
    return {f'{o.parent.name}/{k}':v for o in found for k,v in load_file(o).items()}


@pytest.fixture(scope='module')
def whole_run(base, tmp_path_factory):
    "Six steps in one go"
    out = tmp_path_factory.mktemp('whole')/'run'
    train.distil(recipe(**STEPS), out, base)
    return out


@pytest.mark.parametrize('how', ['ctrl-c', 'crash'])
def test_resumed_run_is_the_same_run(how, whole_run, base, tmp_path, monkeypatch):
    """Ctrl-C in the third step, or a crash in the fifth (state of the third on disk, fourth in the log):
    the resumed run ends with the bits of the run in one go, weights, average and log"""
    step,calls = train.distil_step,[]
    def cut_off(*args):
        calls.append(1)
        if how=='ctrl-c' and len(calls)==5: signal.raise_signal(signal.SIGINT) # first of two micro-batches of step 3
        if how=='crash' and len(calls)==10: raise RuntimeError("the power went")
        return step(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt if how=='ctrl-c' else RuntimeError):
        m.setattr(train, 'distil_step', cut_off)
        train.distil(recipe(**STEPS), tmp_path/'run', base)
    assert states(tmp_path/'run')==([2] if how=='ctrl-c' else [3]) # the third step is given up in its middle
    assert not (tmp_path/'run/pipeline').exists()
    assert len(log(tmp_path/'run')) == (2 if how=='ctrl-c' else 4)
    train.distil(recipe(**STEPS), tmp_path/'run', base, resume=True)
    assert log(tmp_path/'run')==log(whole_run)
    assert [o['step'] for o in log(whole_run)]==list('123456')
    old,new = weights_on_disk(whole_run),weights_on_disk(tmp_path/'run')
    assert old.keys()==new.keys() and [k for k in old if not torch.equal(old[k],new[k])]==[]


def test_pretraining_resumes_too(base, tmp_path, monkeypatch):
    "The teacher's run, cut off by Ctrl-C and resumed, is the run in one go"
    r = recipe(teacher_steps=4, save_every=100)
    train.pretrain(r, tmp_path/'whole', base=base)
    drop,calls = train.drop_condition,[]
    def cut_off(*args):
        calls.append(1)
        if len(calls)==2: signal.raise_signal(signal.SIGINT)
        return drop(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, 'drop_condition', cut_off)
        train.pretrain(r, tmp_path/'run', base=base)
    assert len(log(tmp_path/'run'))==2
    train.pretrain(r, tmp_path/'run', base=base, resume=True)
    assert log(tmp_path/'run')==log(tmp_path/'whole')
    old,new = weights_on_disk(tmp_path/'whole'),weights_on_disk(tmp_path/'run')
    assert old.keys()==new.keys() and [k for k in old if not torch.equal(old[k],new[k])]==[]


@pytest.mark.slow
def test_ctrl_c_from_outside(base, tmp_path):
    """SIGINT to a running `sfv-lite distil`: the state of the last whole step is saved,
    one line says how to go on, no half pipeline lies about; `--resume` finishes the run"""
    out = tmp_path/'run'
    limits = sets(clips=8, batch=2, steps=16, head_start=0, log_every=1, save_every=1000, sample_every=1000)
    command = ['distil', '--base', base, '-o', out, *limits]
    code = 'import sys; from sfv_lite.cli import main; sys.exit(main())'
    process = subprocess.Popen([sys.executable, '-c', code, *map(str, command)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic()+120
    while not (out/'log.csv').exists() and process.poll() is None and time.monotonic()<deadline: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    _,err = process.communicate(timeout=120)
    said = [o for o in err.replace('\r','\n').splitlines() if 'error' in o.lower()]
    assert process.returncode==130 and 'Traceback' not in err, err
    assert len(said)==1 and said[0].startswith('sfv-lite distil: error: stopped after step'), err
    assert '--resume' in said[0], err
    assert err.endswith(said[0]+'\n')
    done, = states(out)
    assert 1<=done<16 and len(log(out))==done
    assert sorted(o.name for o in out.iterdir())==['.lock','log.csv','recipe.json','state']
    again = sfv(*command, '--resume')
    assert again.returncode==0, again.stderr
    assert [int(o['step']) for o in log(out)]==list(range(1,17))
    load_pipeline(out)


def test_a_run_is_not_overwritten(whole_run, base, capsys):
    """A folder that holds a run is refused without --resume, and with --resume when the recipe is another one,
    naming the key; not a byte of it changes"""
    before = files(whole_run)
    command = ['distil', '--base', str(base), '-o', str(whole_run), *sets(**{**TINY, **STEPS})]
    assert main(command)!=0
    assert '--resume' in capsys.readouterr().err and files(whole_run)==before
    assert main([*command, '--resume', '--set', 'lam=0.25'])!=0
    said = capsys.readouterr().err
    assert 'lam = 0.1' in said and '0.25' in said and len(said.splitlines())==1, said
    assert files(whole_run)==before
    assert main([*command, '--resume', '--base', 'digits'])!=0
    assert 'whose files were others than those of digits' in capsys.readouterr().err and files(whole_run)==before


@pytest.mark.slow
def test_two_processes_share_a_run(base, tmp_path):
    """Two gloo processes: one log, one state, one pipeline, and the weights of both are the same at the end (the state
    that rank 0 wrote is the one a run of one process would go on from)"""
    script = """if 1:
        import sys, torch, torch.distributed as dist
        from sfv_lite import checkpoint, train
        from sfv_lite.recipe import Recipe
        looked,real = [],checkpoint.not_finite
        checkpoint.not_finite = lambda named: looked.append(len(named)) or real(named)
        states,create = [],train.State.create
        train.State.create = lambda *a: states.append(create(*a)) or states[-1]
        train.distil(Recipe.load('digits', **eval(sys.argv[3])), sys.argv[2], sys.argv[1])
        mine = torch.cat([p.detach().flatten() for net in (states[0].G,states[0].heads) for p in net.parameters()])
        sums = [torch.zeros(2) for _ in range(2)]
        dist.all_gather(sums, torch.stack([mine.norm(), mine.sum()]))
        assert dist.get_world_size()==2 and torch.equal(*sums), sums
        assert looked==[5], looked # G, heads, an optimiser each, the average"""
    out,overrides = tmp_path/'run',{**TINY, **dict(steps=3, head_start=1, batch=4, sample_every=2)}
    (tmp_path/'two.py').write_text(script)
    done = python(*TORCHRUN, tmp_path/'two.py', base, out, repr(overrides))
    assert done.returncode==0, done.stderr[-3000:]
    assert [o['step'] for o in log(out)]==list('1234')
    assert states(out)==[4]
    left = ['.lock','averages','log.csv','pipeline','recipe.json','samples','state','validation.csv']
    assert sorted(o.name for o in out.iterdir())==left
    load_pipeline(out)
    (row,) = csv.DictReader((out/'validation.csv').open())
    assert row['step']=='4' and float(row['val_frozen_real'])==0


@pytest.mark.slow
def test_one_of_two_processes_is_interrupted(base, tmp_path):
    """SIGTERM, as schedulers send it, to one process of two and in the middle of a step:
    both end at the same micro-batch, and the state is whole.
    (Did each decide for itself, the other would wait in the next step for ever.)"""
    script = """if 1:
        import os, signal, sys
        from sfv_lite import train
        from sfv_lite.recipe import Recipe
        def data(*args):
            for k,batch in enumerate(train.digit_batches(*args)):
                if k==3 and args[3].process_index==1: os.kill(os.getpid(), signal.SIGTERM)
                yield batch
        try: train.distil(Recipe.load('digits', **eval(sys.argv[3])), sys.argv[2], sys.argv[1], data)
        except KeyboardInterrupt as e: print(e)
        else: raise SystemExit('was not stopped')"""
    out,overrides = tmp_path/'run',{**TINY, **dict(steps=12, head_start=0, batch=4)}
    (tmp_path/'two.py').write_text(script)
    done = python(*TORCHRUN, tmp_path/'two.py', base, out, repr(overrides), timeout=200)
    assert done.returncode==0, done.stderr[-3000:]
    assert done.stdout.count('stopped after step 4 of 12')==2, done.stdout
    assert states(out)==[4] and not (out/'pipeline').exists()


# other optimisers ---------------------------------------------------------------------------------

def test_eight_bits_missing(base, tmp_path, monkeypatch, capsys):
    "adamw8bit without bitsandbytes: one line with the cure, before anything is written"
    from sfv_lite import runs
    monkeypatch.setattr(runs, 'find_spec', lambda name: None)
    out = tmp_path/'run'
    assert main(['distil', '--base', str(base), '-o', str(out), *sets(**{**TINY, 'optimizer':'adamw8bit'})])!=0
    said = capsys.readouterr().err
    assert 'pip install bitsandbytes' in said and len(said.splitlines())==1 and not out.exists()


def test_eight_bits(base, tmp_path):
    "Moments in bytes, weights within 2 % of AdamW's way; a run goes on from its state as if it had never stopped"
    pytest.importorskip('bitsandbytes')
    from sfv_lite.sfv import make_optimizer
    g,ways = torch.Generator().manual_seed(0),{}
    start,grads = torch.randn(128,64, generator=g),torch.randn(20,128,64, generator=g)
    for name in ('adamw','adamw8bit'):
        p = torch.nn.Parameter(start.clone())
        opt = make_optimizer([p], SimpleNamespace(optimizer=name, momentum=.5, beta=.999), 1e-2)
        for o in grads:
            p.grad = o.clone()
            opt.step()
        ways[name] = p.detach()-start
    assert opt.state[p]['state1'].dtype==torch.uint8
    assert (ways['adamw8bit']-ways['adamw']).norm()<.02*ways['adamw'].norm()
    r = recipe(optimizer='adamw8bit', steps=4)
    whole = train.distil(r, tmp_path/'whole', base=base)
    train.distil(dataclasses.replace(r, steps=2), tmp_path/'part', base=base)
    part = train.distil(r, tmp_path/'part', base=base, resume=True)
    assert files(whole/'unet')==files(part/'unet')


def test_eight_bits_are_exported_anywhere(base, tmp_path, monkeypatch):
    "A stopped run's student is taken where bitsandbytes is not"
    from sfv_lite import runs
    from sfv_lite.export import student_of
    out,file = tmp_path/'run',tmp_path/'run'/'recipe.json'
    train.distil(recipe(steps=2, optimizer='adamw'), out, base=base)
    shutil.rmtree(out/'pipeline')
    student = student_of(out).unet.state_dict()
    file.write_text(file.read_text().replace('"adamw"', '"adamw8bit"'))
    for o in (out/'state').glob('*/manifest.json'): # as such a run's state would say
        said = json.loads(o.read_text().replace('"adamw"', '"adamw8bit"'))
        said.pop('seal')
        o.write_text(sealed(said))
    monkeypatch.setattr(runs, 'find_spec', lambda name: None)
    for k,v in student_of(out).unet.state_dict().items(): assert torch.equal(v, student[k]), k


def test_a_tracker_goes_on_with_its_run(base, tmp_path, monkeypatch):
    "Both sittings of a run ask a tracker for the same run there; another run for another"
    from accelerate import Accelerator
    asked = []
    monkeypatch.setattr(Accelerator, 'init_trackers', lambda self, name, config, init_kwargs: asked.append(init_kwargs))
    r = recipe(steps=1, tracker='tensorboard')
    train.distil(r, tmp_path/'run', base=base)
    train.distil(dataclasses.replace(r, steps=2), tmp_path/'run', base=base, resume=True)
    train.distil(r, tmp_path/'other', base=base)
    first,second,other = (o['wandb'] for o in asked)
    assert first==second!=other and first['id'] and first['resume']=='allow'
