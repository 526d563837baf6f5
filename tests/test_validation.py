"What a run says of clips that it does not train on; averages that are kept; runs that begin with another's weights"
import json, shutil
from types import SimpleNamespace
import pytest, torch
from conftest import TINY, recipe, sets
from safetensors.torch import load_file
from sfv_lite import train
from sfv_lite.checkpoint import average_at, best_of
from sfv_lite.cli import main
from sfv_lite.digits import digit_batches, held_digits
from sfv_lite.files import read_rows
from sfv_lite.fit import add_lora
from sfv_lite.pipelines import load_pipeline
from sfv_lite.recipe import RecipeError
from sfv_lite.runs import make_accelerator
from sfv_lite.validation import Validation


def unet(folder): return load_file(folder/'unet'/'diffusion_pytorch_model.safetensors')


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):
    "Eight steps with a look every second one"
    out = tmp_path_factory.mktemp('run')/'run'
    train.distil(recipe(steps=8, validate_every=2, validate_clips=16, keep=1, keep_every=4, lr_g=1e-2), out, base)
    return out


# figures ------------------------------------------------------------------------------------------

def test_what_is_written(run):
    "A line a look, with all figures; the newest average, every fourth step's and the best are kept"
    rows = read_rows(run/'validation.csv')
    names = 'recon','speed','frozen','frozen_real','distance','floor','d_real','d_fake'
    assert [o['step'] for o in rows]==list('2468') and set(rows[0])=={'step','sha256',*(f'val_{k}' for k in names)}
    assert len({o['val_floor'] for o in rows})==1 and len({o['val_distance'] for o in rows})==4
    kept = sorted(int(o.stem) for o in (run/'averages').iterdir())
    assert kept==sorted({4, 8, best_of(rows)})
    log = read_rows(run/'log.csv')[-1]
    assert {'lr_g','lr_d','data_s','step_s','clips_s','val_distance'}<=set(log) and float(log['lr_g'])==.01


def test_real_clips_as_answers_lie_at_the_floor():
    """Whoever answers with the clips themselves has no error, their speed, and the distance between the halves;
    whoever answers with a still stands, and is found far away"""
    pipe,r = load_pipeline('digits-teacher'),recipe()
    v = Validation(pipe, make_accelerator(r), held_digits(pipe, r, 16))
    found = v(lambda batch,noise: batch.latents)
    assert found['val_recon']==0 and abs(found['val_speed']-1)<1e-5 and found['val_frozen']==found['val_frozen_real']
    assert abs(found['val_distance']-found['val_floor'])<1e-3
    still = v(lambda batch,noise: batch.latents[:,:1].expand_as(batch.latents))
    assert still['val_frozen']==1 and still['val_speed']<.1 and still['val_distance']>found['val_distance']+50


def test_shared_out_is_the_same(base, monkeypatch):
    "Two processes that see half of the clips each and gather come to the figures of one"
    pipe,r = load_pipeline(base),recipe()
    held,answers = held_digits(pipe, r, 16),lambda batch,noise: batch.latents+.3*noise
    alone = Validation(pipe, make_accelerator(r), held)(answers)
    waiting = {0:[],1:[]}
    def process(rank, others):
        def gather(mine):
            waiting[rank].append(mine)
            other = others.pop(0) if others else mine # a first pass only collects
            pairs = (mine,other) if rank==0 else (other,mine)
            return tuple(map(torch.cat, zip(*pairs))) if isinstance(mine, tuple) else torch.cat(pairs)
        return SimpleNamespace(num_processes=2, process_index=rank, gather=gather)
    Validation(pipe, process(1, []), held)(answers)
    found = Validation(pipe, process(0, list(waiting[1])), held)(answers)
    for k,v in alone.items(): assert abs(found[k]-v)<1e-3*max(1, abs(v)), k


def test_few_clips_and_foreign_data(base, tmp_path, capsys):
    "Data that hold nothing out: said, and shown on the run's own; with three clips, or one, there is no distance"
    def data(*args): yield from digit_batches(*args)
    for n in (3,1):
        r = recipe(validate_clips=3, batch=n, steps=1)
        train.distil(r, tmp_path/str(n), base, data)
        assert "no clips are held out" in capsys.readouterr().err
        (row,) = read_rows(tmp_path/str(n)/'validation.csv')
        assert 'val_distance' not in row and row['val_recon']


def test_no_noise_of_the_run_is_touched(run, base, tmp_path):
    "Looking changes nothing: the weights are those of a run that looks once"
    train.distil(recipe(steps=8, validate_clips=4, lr_g=1e-2), tmp_path/'run', base)
    one,other = unet(tmp_path/'run/pipeline'),unet(run/'pipeline')
    assert all(torch.equal(v, other[k]) for k,v in one.items())


# averages -----------------------------------------------------------------------------------------

def test_export_at(run, base, tmp_path, capsys):
    "The student as it was: of a step that was kept, the best, the last; others are refused by name"
    for at in ('4','best','last'):
        assert main(['export',str(run),'-o',str(tmp_path/at),'--at',at,'--dtype','fp32'])==0
    names = [k for k,p in load_pipeline(base).unet.named_parameters() if p.requires_grad]
    for at,step in {'4':4, 'best':best_of(read_rows(run/'validation.csv')), 'last':8}.items():
        want,got = average_at(run, str(step)),unet(tmp_path/at)
        assert all(torch.equal(got[k], v) for k,v in zip(names, want, strict=True)), at
    assert '4 of 8 steps' in (tmp_path/'4'/'README.md').read_text()
    capsys.readouterr()
    assert main(['export',str(run),'-o',str(tmp_path/'x'),'--at','3'])==1
    assert 'keeps no average of 3; there are ' in capsys.readouterr().err
    file = run/'averages'/'000004.safetensors'
    whole = file.read_bytes()
    file.write_bytes(whole[:-1]+bytes([whole[-1]^1]))
    assert main(['export',str(run),'-o',str(tmp_path/'x'),'--at','4'])==1
    assert '000004.safetensors: was changed' in capsys.readouterr().err and not (tmp_path/'x').exists()
    file.write_bytes(whole)


def test_of_additions_only(base, tmp_path):
    "With LoRA an average holds these; what is exported is a stock UNet"
    train.distil(recipe(steps=4, validate_every=2, lora_rank=2, lr_g=1e-2, keep=9), tmp_path/'run', base)
    assert main(['export',str(tmp_path/'run'),'-o',str(tmp_path/'two'),'--at','2','--dtype','fp32'])==0
    assert len(average_at(tmp_path/'run', '2'))<len(unet(tmp_path/'two'))
    assert unet(tmp_path/'two').keys()==unet(base).keys()


def test_what_came_after_is_gone(base, tmp_path):
    "A run that goes on from step 2 has no averages of later steps, from its first micro-batch on"
    out,asked = tmp_path/'run',recipe(steps=6, validate_every=2, save_every=2, keep=9)
    train.distil(asked, out, base)
    for step in (4,6): shutil.rmtree(out/'state'/f'{step:06}')
    def data(*args):
        assert [o.stem for o in (out/'averages').iterdir()]==['000002']
        raise InterruptedError
        yield
    data.held = digit_batches.held
    with pytest.raises(InterruptedError): train.distil(asked, out, base, data, resume=True)
    assert [o['step'] for o in read_rows(out/'validation.csv')]==['2']


# other beginnings ---------------------------------------------------------------------------------

def test_a_student_goes_on_before_its_teachers_eye(run, base, tmp_path):
    "`--init`: G begins as the student, the judges look through the base; both are part of what the run is"
    pipe,eye = train.with_start(load_pipeline(base), run)
    s = train.make_state(pipe, recipe(), make_accelerator(recipe()), eye)
    student,teacher = unet(run/'pipeline'),unet(base)
    assert all(torch.equal(v, student[k]) for k,v in s.G.unet.state_dict().items())
    seen_by = s.D.encoder.state_dict()
    assert seen_by and all(torch.equal(v, teacher[k]) for k,v in seen_by.items())
    argv = ['distil','--base',str(base),'--init',str(run),'-o',str(tmp_path/'run'),*sets(**TINY)]
    assert main(argv)==0
    assert json.loads((tmp_path/'run/recipe.json').read_text())['init']==str(run)
    without = [o for o in argv if o not in ('--init',str(run))]
    assert main([*without,'--resume'])==1 and main([*argv,'--set','steps=7','--resume'])==0
    other = small_svd(tmp_path)
    with pytest.raises(ValueError, match='of another kind'): train.with_start(load_pipeline('digits'), other)


def small_svd(folder):
    from sfv_lite.pipelines import save_pipeline
    from sfv_lite.svd import svd_pipeline
    return save_pipeline(svd_pipeline(small=True), folder/'svd')


def test_a_teacher_is_trained_on(base, tmp_path, capsys):
    "`pretrain --init`: at rate 0 nothing moves; by LoRA only what it adds to; from nothing LoRA is refused"
    argv = ['pretrain','--base',str(base),'--init',str(base),*sets(**TINY)]
    assert main([*argv,'-o',str(tmp_path/'still'),'--set','teacher_lr=0'])==0
    before = unet(base)
    assert all(torch.equal(v, before[k]) for k,v in unet(tmp_path/'still/pipeline').items())
    assert main([*argv,'-o',str(tmp_path/'lora'),'--set','lora_rank=2','--set','teacher_lr=.01'])==0
    moved = {k for k,v in unet(tmp_path/'lora/pipeline').items() if not torch.equal(v, before[k])}
    fresh = load_pipeline(base).unet
    add_lora(fresh, 2)
    of = {k.split('.lora_')[0]+'.weight' for k,p in fresh.named_parameters() if p.requires_grad}
    assert moved and moved<=of
    with pytest.raises(RecipeError, match='lora_rank = 2: adds to a network'):
        train.pretrain(recipe(lora_rank=2), tmp_path/'x', base=base)


def test_pretrain_computes_blocks_again(base, tmp_path):
    "`checkpointing` holds for the teacher too, and changes no loss"
    for again in (False,True): train.pretrain(recipe(checkpointing=again), tmp_path/str(again), base=base)
    one,two = ([float(o['loss']) for o in read_rows(tmp_path/str(again)/'log.csv')] for again in (False,True))
    assert one==pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize('method', ['ladd','consistency'])
def test_other_methods(method, base, tmp_path):
    "From the command line, with LoRA and blocks that are computed again"
    more = sets(**TINY | dict(lora_rank=2, checkpointing='true', clips=8, steps=2))
    assert main(['distil','--method',method,'--base',str(base),'-o',str(tmp_path/'run'),*more])==0
    r = json.loads((tmp_path/'run/recipe.json').read_text())
    assert r['P_mean']==(1. if method=='ladd' else -1.)
    assert (tmp_path/'run/pipeline/model_index.json').exists()
