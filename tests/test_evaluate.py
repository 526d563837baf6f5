"The ruler: whole evaluations, faults, the rivals' runs"
import csv, importlib.util, json, math, sys
import pytest, torch
from conftest import ROOT, begin, files, recipe
from sfv_lite import baselines, evaluate as ev, judge
from sfv_lite.cli import main
from sfv_lite.files import load_clip, load_image, save_clip
from sfv_lite.pipelines import load_pipeline
from sfv_lite.sampling import sample_once
from sfv_lite.svd import Denoiser, condition, decode
from sfv_lite.digits import digit_clips
from sfv_lite.train import distil
from sfv_lite.video import moving_digits


@pytest.fixture(scope='module')
def table(tmp_path_factory, base):
    "A small evaluation of three ways: the folder, and what was printed"
    out = tmp_path_factory.mktemp('evaluation')
    assert main(['evaluate', 'digits', 'digits-teacher', f'{base}@2r', '-o', str(out), '--clips', '64'])==0
    return out


def test_evaluate_leaves_a_table(table, base):
    "Markdown, CSV, JSON, a figure and moving clips, all with one line a way"
    ways = ['digits@1','digits-teacher@1',f'{base}@2r']
    result = json.loads((table/'table.json').read_text())
    rows = result['rows']
    assert result['clips']==64 and [o['clips by'] for o in rows]==ways and [o['evaluations'] for o in rows]==[1,1,2]
    assert [o['clips by'] for o in csv.DictReader((table/'table.csv').open(newline=''))]==ways
    assert all(f'| {o} ' in (table/'table.md').read_text() for o in ways)
    assert load_image(table/'excess.png').shape[0]==3 and len(load_clip(table/'clips.gif'))==8
    for o in rows:
        assert all(math.isfinite(v) for v in o.values() if isinstance(v,float))
        assert o['interval']>0 and o['seconds']>0


def test_the_student_is_nearer_than_its_teacher_in_one_step(table):
    """The shipped student's excess is at most a quarter of the teacher's at one step (a fifth on 512 clips,
    but these are few); noise from an untrained network is worse than either"""
    student,teacher,untrained = (o['excess'] for o in json.loads((table/'table.json').read_text())['rows'])
    assert student<teacher/4 and untrained>teacher


def test_rows_are_made_once(table, base):
    """A second call finds its rows; what it writes is the same to the byte;
    another way is added without touching those that are there"""
    before = files(table)
    assert main(['evaluate', 'digits', 'digits-teacher', f'{base}@2r', '-o', str(table), '--clips', '64'])==0
    after = files(table)
    rows = lambda found: {k:v for k,v in found.items() if k.startswith('rows')}
    assert rows(before)==rows(after)
    assert before['table.json']==after['table.json'] and before['table.csv']==after['table.csv']


def test_fingerprint_notices(base, tmp_path):
    "Other steps, other clips, another seed: another row"
    way,two,renoised = ev.Way(str(base)),ev.Way(str(base),2),ev.Way(str(base),2,renoise=True)
    asked = (way,64,0),(way,64,1),(way,128,0),(two,64,0),(renoised,64,0),(ev.Way('digits'),64,0)
    prints = [ev.fingerprint(*o) for o in asked]
    assert len(set(prints))==len(prints) and ev.fingerprint(way,64,0)==prints[0]


def test_one_step_is_asked_as_said():
    """One step is the highest level alone; with guidance the first latent frame stays and the last is pushed away from
    the answer without a picture"""
    real,_ = moving_digits(2, 5, 'test')
    plain,guided = (ev.make_clips(ev.Way('digits-teacher',1,o), real[:,0])[0] for o in (1.,2.))
    pipe,g = load_pipeline('digits-teacher'),torch.Generator().manual_seed(0)
    D,cond = Denoiser(pipe.unet).eval(),condition(pipe, real[:,0], generator=g)
    noise = torch.randn(2, 8, 4, 8, 8, generator=g)
    with torch.no_grad(): given,null = (sample_once(D, o, noise) for o in (cond,cond.null()))
    by_hand = decode(pipe.vae, null + torch.linspace(1,2,8).view(-1,1,1,1)*(given-null))
    torch.testing.assert_close(plain, decode(pipe.vae, given), atol=1e-4, rtol=0)
    torch.testing.assert_close(guided, by_hand, atol=1e-4, rtol=0)
    assert (plain-guided)[:,-1].abs().max()>.1


def test_real_clips_score_nothing():
    "The exam's own clips have no excess and read 1 everywhere; clips by nobody do"
    exam = ev.Exam(64)
    ends = ev.real_ends(exam.pictures, exam.seeds)
    real = exam.mark(exam.twin, ends)
    assert real['excess']==pytest.approx(0, abs=1e-9) and real['distance']==pytest.approx(real['floor'])
    ratios = ('speed','spread','straight','sharp','diverse')
    assert all(real[k]==pytest.approx(1) for k in ratios) and real['frozen']==0 and real['read']>.85
    noise = exam.mark(torch.rand(exam.twin.shape, generator=torch.Generator().manual_seed(0))*2-1, ends)
    assert noise['excess']>5*noise['interval'] and noise['read']<.3


def test_clips_without_light():
    "Black clips and single colours go through every metric"
    exam = ev.Exam(64)
    for value in (-1.,1.):
        x = torch.full_like(exam.twin, value)
        assert all(math.isfinite(v) for v in exam.mark(x, x[:16,-1].unflatten(0,(2,8))).values())


@pytest.mark.parametrize('argv,words', [
    ([], ['name the runs']),
    (['digits@0'], ['digits@0','MODEL@STEPS']),
    (['nowhere'], ['nowhere','digits-teacher']),
    (['digits','--clips','3'], ['--clips',"'3'"]),
    (['digits','--fvd','a','b'], ['name the runs']),
    (['--fvd','a','b'], ['--i3d']),
    (['--fvd','a','b','--i3d','nowhere.pt'], ['nowhere.pt','nothing is downloaded']),
    (['--fvd','empty','empty','--i3d','i3d.pt'], ['empty','no videos'])])
def test_bad_evaluations(argv, words, tmp_path, monkeypatch, capsys):
    "One line that names the thing, and nothing written"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'empty').mkdir()
    (tmp_path/'i3d.pt').write_bytes(b'')
    before = files(tmp_path)
    try: code = main(['evaluate', *argv])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code and len(err.splitlines())==1 and all(o in err for o in words), err
    assert files(tmp_path)==before


def test_exam_on_films(tmp_path, capsys, monkeypatch):
    "`--frames`: a table on films of the user's own; what is there is not made again; size and place that give nothing"
    x,_ = moving_digits(8, 5, 'test')
    for i in range(4): save_clip(x[2*i:2*i+2].flatten(0,1), tmp_path/'films'/f'{i}.mp4', 7)
    ask = ['evaluate', 'digits', '--frames', str(tmp_path/'films'), '-o', str(tmp_path/'exam'), '--clips', '8']
    assert main(ask)==0
    assert 'clips by' in capsys.readouterr().out
    row, = json.loads((tmp_path/'exam/table.json').read_text())['rows']
    assert .3<row['speed']<3 and row['frozen_real']==0 and {'distance','floor','sharp','diverse'}<=set(row)
    with monkeypatch.context() as m:
        m.setattr('sfv_lite.films_exam.make_clips', None)
        assert main(ask)==0
    assert main([*ask, '--height', '512', '--width', '512'])==1
    said = capsys.readouterr().err
    assert '8 frames of 512×512' in said and 'gave 0 clips' in said
    assert main([*ask[:3], str(tmp_path/'none'), *ask[4:]])==1


def test_judge_from_nothing(tmp_path, capsys):
    """The verb trains a judge, writes it and says its marks;
    a file that is none is refused with the command that makes one"""
    path = tmp_path/'new/judge.safetensors'
    assert main(['judge', '-o', str(path), '--steps', '2'])==0
    assert 'kind' in capsys.readouterr().out and isinstance(judge.load_judge(path), judge.Judge)
    (tmp_path/'odd.safetensors').write_bytes(b'odd')
    with pytest.raises(ValueError, match='sfv-lite judge'): judge.load_judge(tmp_path/'odd.safetensors')
    with pytest.raises(FileNotFoundError, match='sfv-lite judge'): judge.load_judge(tmp_path/'none.safetensors')


def test_consistency_resumes_to_the_bit(base, tmp_path):
    "Four steps, and two and two: the same weights; another guidance is another run"
    class Stop(Exception): pass
    from sfv_lite.train import digit_batches
    def broken(*args):
        for k,o in enumerate(digit_batches(*args)):
            if k==2: raise Stop
            yield o
    r = recipe(steps=4, save_every=2)
    with pytest.raises(Stop): baselines.consistency(r, tmp_path/'a', base, data=broken)
    with pytest.raises(ValueError, match='guidance'):
        baselines.consistency(r, tmp_path/'a', base, guidance=2., resume=True)
    a,b = baselines.consistency(r, tmp_path/'a', base, resume=True),baselines.consistency(r, tmp_path/'b', base)
    name = 'unet/diffusion_pytorch_model.safetensors'
    assert (a/name).read_bytes()==(b/name).read_bytes()!=(base/name).read_bytes()


def test_ladd_trains_on_the_teachers_clips(base, tmp_path):
    "LADD is `distil` with other numbers and other data, and no reconstruction"
    from functools import partial
    from sfv_lite.train import digit_batches
    clips = baselines.teachers_clips(ev.Way(str(base),2))
    r = recipe(steps=2, clips=8, **baselines.LADD)
    made,real = (f(load_pipeline(base), r, 4, 0) for f in (clips,digit_clips))
    assert not torch.equal(made.latents, real.latents) and torch.equal(made.cond.image_embeds, real.cond.image_embeds)
    assert distil(r, tmp_path/'run', base, data=partial(digit_batches, clips=clips)).exists()


@pytest.mark.skipif(not importlib.util.find_spec('cdfvd'), reason="needs the extra fvd")
def test_fvd_of_two_folders(tmp_path):
    """The literature's FVD by cd-fvd (with random I3D weights):
    nothing between equal folders, much to noise; everything it depends on is said"""
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    torch.manual_seed(0)
    torch.save(InceptionI3d(400, in_channels=3).state_dict(), tmp_path/'i3d.pt')
    for name in ('a','b'):
        x = moving_digits(6, seed=1)[0] if name=='a' else torch.rand(6,8,3,32,32)*2-1
        for i,o in enumerate(x): save_clip(torch.cat([o,o.flip(0)]), tmp_path/name/f'{i}.mp4')
    size = ['--length', '10', '--height', '64', '--width', '64']
    ask = ['evaluate', '--i3d', str(tmp_path/'i3d.pt'), *size, '-o', str(tmp_path/'out')]
    def distance(a, b):
        assert main([*ask, '--fvd', str(tmp_path/a), str(tmp_path/b)])==0
        return json.loads((tmp_path/'out/fvd.json').read_text())
    same,far = distance('a','a'),distance('a','b')
    said = dict(real=6, made=6, frames=10, height=64, width=64)
    assert {k:same[k] for k in said}==said
    assert abs(same['fvd'])<1e-2*far['fvd']


class Mean(torch.nn.Module):
    "Called as StyleGAN-V's I3D is"
    def forward(self, x, rescale:bool=False, resize:bool=False, return_features:bool=False): return x.mean((3,4))/255


@pytest.fixture
def ucf(tmp_path, monkeypatch):
    "The script of the paper's Table 1, four films of which one is too short, and an I3D that is none"
    path = ROOT/'nbs/experiments/ucf.py'
    spec = importlib.util.spec_from_file_location('ucf', path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    x,_ = moving_digits(4, 5, 'test')
    for i in range(4): save_clip(x[i].repeat(2,1,1,1)[:5 if i==3 else 16], tmp_path/f'films/class {i//2}/{i}.mp4', 7)
    torch.jit.script(Mean()).save(tmp_path/'i3d.pt')
    def run(out, *more):
        argv = [path, tmp_path/'films', tmp_path/out, *more, '--i3d', tmp_path/'i3d.pt']
        monkeypatch.setattr(sys, 'argv', [*map(str, argv)])
        script.main()
    return run


def test_protocol_of_table_1(ucf, base, tmp_path, capsys):
    """Films' first frames, clips of both sides at UCF-101's size, a table with FVD; what is there is not made again;
    shared out it is the same; another size wants another folder"""
    ask = f'{base}@1', f'{base}@2x2', '--frames', '8', '--size', '48x32'
    ucf('one', *ask)
    said = capsys.readouterr().out
    rows = json.loads((tmp_path/'one/table.json').read_text())
    assert [(o['clips'],o['evaluations']) for o in rows]==[(3,1),(3,4)] and all(o['FVD']>0 for o in rows)
    assert f'{base}@2x2' in said and f"{rows[1]['FVD']:.4g}" in said
    names = ['class 0--0.mp4','class 0--1.mp4','class 1--2.mp4']
    for folder in ('real', *(f"made/{o['folder']}" for o in rows)):
        assert sorted(o.name for o in (tmp_path/'one'/folder).iterdir())==names
        assert load_clip(tmp_path/'one'/folder/names[0]).shape==(8,3,240,320)
    before = {o:o.stat().st_mtime_ns for o in (tmp_path/'one').rglob('*.mp4')}
    gone = tmp_path/'one/made'/rows[1]['folder']/names[1]
    gone.unlink()
    ucf('one', *ask)
    assert [o for o,t in before.items() if o.stat().st_mtime_ns!=t]==[gone]
    again = json.loads((tmp_path/'one/table.json').read_text())
    assert all(o['FVD']==pytest.approx(p['FVD'], rel=1e-4) for o,p in zip(again, rows, strict=True))
    for part in ('1/2','0/2'): ucf('two', *ask, '--part', part)
    assert not (tmp_path/'two/table.json').exists()
    ucf('two', *ask)
    for o in before: # x264 does not encode twice alike
        one,two = (load_clip(p) for p in (o, tmp_path/'two'/o.relative_to(tmp_path/'one')))
        assert (one-two).abs().mean()<.02
    assert len(before)==9
    with pytest.raises(SystemExit, match='choose another one'): ucf('one', *ask[:-1], '32x32')


@pytest.mark.slow
def test_protocol_of_table_1_with_stand_ins(ucf, tmp_path):
    "A small SVD of random weights, in one step and in four with guidance"
    ucf('small', '--small', '--clips', '2', '--frames', '10')
    rows = json.loads((tmp_path/'small/table.json').read_text())
    assert [(o['clips'],o['evaluations']) for o in rows]==[(2,1),(2,8)]


def test_held_out_as_the_runs_did(tmp_path):
    "An exam on shards takes the films that the runs held out; runs that held out others each are not compared on them"
    from sfv_lite.evaluate import Way
    from sfv_lite.films_exam import held_by, real_clips
    ways = []
    for name,share in dict(a=.2, b=.2, c=.3).items():
        (tmp_path/name).mkdir()
        begin(tmp_path/name, 'distil', recipe(held_out=share))
        file = tmp_path/name/'recipe.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(data='shards')))
        ways.append(Way(str(tmp_path/name)))
    assert held_by([Way('digits')])==.01 and held_by([*ways[:2], Way('digits')])==.2
    with pytest.raises(ValueError, match='held_out = 0.2 and 0.3'): held_by(ways)
    with pytest.raises(FileNotFoundError, match='nofilms'): # of films it is not asked
        real_clips(tmp_path/'nofilms', load_pipeline('digits'), 4, ways=ways)
