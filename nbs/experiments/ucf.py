"""The paper's Table 1 (§4): FVD on UCF-101. The first frame of each film is the condition; 14 frames of 1024×576 are
made of it and resized to 320×240, the films' own size. What is done is skipped, what was stopped goes on.

    python nbs/experiments/ucf.py UCF-101 OUT runs/student path/to/svd@25x3 --i3d i3d_pretrained_400.pt --dtype fp16
    python nbs/experiments/ucf.py FILMS OUT --small # random weights, small pictures: proves that the line runs, no more

I3D is cd-fvd's (the extra fvd) or a TorchScript file's, as StyleGAN-V has it; without --i3d clips are made and not
judged. Several GPUs share the work by --part 0/8, --part 1/8 …; the command without it then judges.

What the paper leaves open: how many films (here all, or --clips of them, the same ones for every model), how fast real
frames follow each other (7 a second; films shorter than a clip are passed over) and how 4:3 becomes 16:9 (squeezed, and
stretched again, so that nothing is cut off)."""
import argparse, hashlib, json
from pathlib import Path
from zipfile import ZipFile, is_zipfile
import torch
from einops import rearrange
from torch.nn import functional as F
from sfv_lite.evaluate import Way, fingerprint, fvd, read_videos, video_files
from sfv_lite.files import progress_bar, save_clip, table, write_text
from sfv_lite.films import Became, Cutting, clips_of
from sfv_lite.footage import find_films
from sfv_lite.judge import frechet, moments
from sfv_lite.pipelines import check_size, load_pipeline, save_pipeline
from sfv_lite.svd import Denoiser, condition, decode, svd_pipeline

HEIGHT,WIDTH = 240,320 # of UCF-101's films
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
OPTIONS = { # kind, default, what
    'clips':(int, None, "films, in an order that mixes the classes; all"), 'frames':(int, 14, "a clip"),
    'fps':(float, 7., "real frames a second, which the model is told"), 'seed':(int, 0, "of all noise"),
    'size':(str, None, "at which clips are made; 1024x576, or 128x64 with --small"),
    'dtype':(str, 'fp32', "fp32, fp16 or bf16, of UNet and image tower"),
    'chunk':(int, None, "frames decoded at a time, to save memory; all"),
    'part':(str, '0/1', "K/N: every N-th film from K on"), 'i3d':(Path, None, "weights of I3D")}


def asked():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('films', type=Path)
    p.add_argument('out', type=Path)
    p.add_argument('ways', nargs='*', type=Way.parse, help="MODEL[@STEPS[xGUIDANCE]]")
    p.add_argument('--small', action='store_true')
    for name,(kind,default,help) in OPTIONS.items(): p.add_argument(f'--{name}', type=kind, default=default, help=help)
    a = p.parse_args()
    a.width,a.height = map(int, (a.size or ('128x64' if a.small else '1024x576')).split('x'))
    a.dtype = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[a.dtype]
    if bool(a.ways)==a.small: p.error("name models, or ask for --small")
    if not a.films.is_dir(): p.error(f"{a.films}: no such folder of films")
    if a.i3d and not a.i3d.is_file(): p.error(f"--i3d {a.i3d}: no such file; nothing is downloaded here")
    return a


def stand_ins(a):
    "A small SVD and, where cd-fvd is installed, an I3D, both of random weights"
    model,i3d = a.out/'small-svd',a.out/'random-i3d.pt'
    if not model.exists(): save_pipeline(svd_pipeline(small=True), model)
    a.ways = [Way(str(model)), Way(str(model), 4, 3.)]
    if a.i3d: return
    try: from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    except ImportError: return
    torch.manual_seed(0)
    torch.save(InceptionI3d(400, in_channels=3).state_dict(), i3d)
    a.i3d = i3d


def one_protocol(a):
    "A folder is of one protocol, which stands in it; raises where it is another"
    names = 'films','clips','frames','fps','seed','width','height','dtype'
    said,file = {k:str(getattr(a, k)) for k in names},a.out/'protocol.json'
    before = json.loads(file.read_text()) if file.exists() else said
    if before!=said: raise SystemExit(f"{file}: this folder is of {before}, not {said}; choose another one")
    write_text(file, json.dumps(said, indent=1)+'\n')


def films(a):
    "Number, name and film, in an order decided by names, so that any number of the first ones are of all classes"
    name = lambda o: o.path.relative_to(a.films).with_suffix('').as_posix().replace('/', '--')
    by_hash = sorted(find_films(a.films).films, key=lambda o: hashlib.sha256(name(o).encode()).hexdigest())
    k,n = map(int, a.part.split('/'))
    return [(i,name(o),o) for i,o in enumerate(by_hash[:a.clips])][k::n]


def first_clip(film, a):
    "A film's first frames `(t 3 h w)`, or None where there are too few; UCF-101's films are one shot each"
    found = next(clips_of(film, Cutting(a.frames, a.fps, HEIGHT, WIDTH, shot=float('inf'), upscale=True)))
    return None if isinstance(found, Became) else rearrange(torch.from_numpy(found[1]), 't h w c -> t c h w')/127.5-1


@torch.no_grad()
def answer(way:Way, pipe, first, number:int, a):
    "A clip `(t 3 h w)` of a first frame `(3 h w)`, at UCF-101's size. Film i gets the same noise whoever answers"
    g = torch.Generator().manual_seed(a.seed*1_000_003+number)
    wide = F.interpolate(first[None], (a.height,a.width), mode='bicubic', antialias=True).clamp(-1,1)
    cond = condition(pipe, wide.to(DEVICE), round(a.fps), generator=g)
    shape = 1,a.frames,pipe.unet.config.out_channels,*cond.image_latents.shape[-2:]
    z = way.sample(Denoiser(pipe.unet).eval(), cond, torch.randn(shape, generator=g).to(DEVICE), g)
    made = decode(pipe.vae, z, a.chunk)[0].float().cpu().clamp(-1,1)
    return F.interpolate(made, (HEIGHT,WIDTH), mode='bilinear', antialias=True)


def make(way:Way, folder:Path, a):
    "Real clips and answers that are not there yet"
    pipe = load_pipeline(way.model, a.dtype).to(DEVICE)
    check_size(pipe, a.height, a.width, a.frames, f'{way.model}: ')
    for number,name,film in progress_bar(films(a), str(way)):
        real,made = a.out/'real'/f'{name}.mp4',folder/f'{name}.mp4'
        if real.exists() and made.exists() or (clip := first_clip(film, a)) is None: continue
        if not made.exists(): save_clip(answer(way, pipe, clip[0], number, a), made, a.fps)
        if not real.exists(): save_clip(clip, real, a.fps)


def distance(real:Path, made:Path, a)->float:
    "FVD of two folders, by a TorchScript I3D or else by cd-fvd"
    script = is_zipfile(a.i3d) and any(o.endswith('constants.pkl') for o in ZipFile(a.i3d).namelist())
    if not script: return fvd(real, made, a.i3d, a.frames, HEIGHT, WIDTH)['fvd']
    i3d = torch.jit.load(a.i3d, map_location=DEVICE).eval()
    @torch.no_grad()
    def seen(folder):
        clips = (torch.from_numpy(o).to(DEVICE) for o in read_videos(video_files(folder), a.frames, HEIGHT, WIDTH))
        inputs = (rearrange(o.float(), '1 t h w c -> 1 c t h w') for o in clips) # 0…255
        return torch.cat([i3d(o, rescale=True, resize=True, return_features=True).flatten(1) for o in inputs])
    return frechet(moments(seen(real)), moments(seen(made)))


def main():
    a = asked()
    if a.small: stand_ins(a)
    one_protocol(a)
    rows = []
    for way in a.ways:
        folder = a.out/'made'/fingerprint(way, 0, a.seed)
        make(way, folder, a)
        real,made = ([o.name for o in video_files(o)] for o in (a.out/'real',folder))
        if odd := sorted({*real}^{*made}):
            print(f"{folder} and {a.out/'real'}: {len(odd)} clips are in one only, such as {odd[0]}; no FVD")
        figure = distance(a.out/'real', folder, a) if a.i3d and not odd and a.part=='0/1' else None
        row = {'clips by':str(way), 'evaluations':way.calls, 'FVD':figure, 'clips':len(made), 'folder':folder.name}
        rows.append(row)
    if a.part=='0/1': write_text(a.out/'table.json', json.dumps(rows, indent=1)+'\n')
    print(table([o | {'FVD':'' if o['FVD'] is None else f"{o['FVD']:.4g}"} for o in rows]))


if __name__=='__main__': main()
