"""Films with mistakes in them, of every kind of container: one line each, no hang, no memory without a bound,
and nothing sent anywhere"""
import random, resource, socket, struct, sys, time
from collections import Counter
import pytest
from sfv_lite.films import Became, Cutting, Film
from sfv_lite.footage import MOST_MEMORY, decoded
from test_films import digits, write

SPEC = Cutting(4, 7, 32, 32)
KINDS = {'mp4':'libx264', 'mov':'mpeg4', 'mkv':'libx264', 'webm':'libvpx', 'avi':'mpeg4', 'flv':'flv1',
    'ts':'mpeg2video', 'gif':'gif', 'mpg':'mpeg1video', 'ogv':'libtheora'}
LARGE = b'\xff'*4, b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f', struct.pack('>i',-1), struct.pack('<I',1<<24)
SECONDS = 20 # a file of one second takes milliseconds; this is no time limit of a machine but of a hang


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A film of a second or two in each kind of container"
    folder = tmp_path_factory.mktemp('whole')
    found = {}
    for kind,codec in KINDS.items():
        fps = 25 if codec in ('mpeg1video','mpeg2video') else 14
        try: write(folder/f'a.{kind}', digits(3, 1), fps, codec, pix_fmt='rgb8' if kind=='gif' else 'yuv420p')
        except Exception as e:
            if 'libtheora' not in str(e) and codec!='libtheora': raise
            write(folder/'a.ogv', digits(3, 1), fps, 'libvpx') # wheels without Theora's encoder
        found[kind] = (folder/f'a.{kind}').read_bytes()
    return found


def mutated(data:bytes, chance)->bytes:
    """Bits flipped, a stretch lost, doubled, zeroed or overwritten with noise, an end missing,
    a number in it made large: one to eight mistakes"""
    data = bytearray(data)
    for _ in range(2**chance.randrange(4)):
        if len(data)<16: break
        head = chance.random()<.4 # headers matter more than their length
        at,n = chance.randrange(min(400,len(data)) if head else len(data)),chance.choice((1,2,4,8,64,400))
        what = chance.randrange(7)
        if what==0: data[at] ^= 1<<chance.randrange(8)
        if what==1: del data[at:at+n]
        if what==2: data[at:at] = data[at:at+n]
        if what==3: data[at:at+n] = bytes(len(data[at:at+n]))
        if what==4: data[at:at+n] = chance.randbytes(len(data[at:at+n]))
        if what==5: del data[max(16,at):]
        if what==6: data[at:at+4] = chance.choice(LARGE)
    return bytes(data)


def tried(films):
    "What became of each, and the seconds it took"
    ends,start = [],time.perf_counter()
    for _,o in decoded(films, SPEC, workers=2):
        if isinstance(o, Became):
            ends.append((o, time.perf_counter()-start))
            start = time.perf_counter()
    return ends


def check(whole, tmp_path, n, seed):
    chance,films = random.Random(seed),[]
    for k in range(n):
        kind = list(KINDS)[k%len(KINDS)]
        films.append(Film(tmp_path/f'{k:04}.{kind}'))
        films[-1].path.write_bytes(mutated(whole[kind], chance))
    ends = tried(films)
    assert len(ends)==n
    for film,(became,seconds) in zip(films, ends):
        said = became.reason or ''
        assert '\n' not in said and 'Traceback' not in said and len(said)<300, (film, said)
        assert seconds<SECONDS, (film, seconds)
        assert became.clips<=40, (film, became) # a second of film, or two mistaken for a few
        assert 'exit code' not in said, (film, said) # an error of Python that nobody foresaw
        if 'decoder' in said: assert 'crashed (SIG' in said or 'killed' in said or 'computed for' in said, (film, said)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*(1 if sys.platform=='darwin' else 1024)
    assert most<MOST_MEMORY
    reasons = Counter((o.reason or 'used').split(' (')[0].split(' after')[0][:40] for o,_ in ends)
    print(reasons, f'{most/2**20:.0f} MiB at most, {max(s for _,s in ends):.2f} s at most')


def test_films_with_mistakes(whole, tmp_path): check(whole, tmp_path, 200, 0)

@pytest.mark.slow
def test_many_films_with_mistakes(whole, tmp_path): check(whole, tmp_path, 2000, 1)


def test_whole_films_are_used(whole, tmp_path):
    "The films that are mutated are good ones before"
    films = []
    for kind,data in whole.items():
        films.append(Film(tmp_path/f'a.{kind}'))
        films[-1].path.write_bytes(data)
    ends = [o for o,_ in tried(films)]
    assert all(o.clips>=1 and o.reason is None for o in ends), dict(zip(whole, ends))


def test_nothing_is_sent(whole, tmp_path):
    """Playlists under every name, a QuickTime film that refers to another place, a list to concatenate:
    a server that waits for a caller sees none"""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        server.settimeout(.2)
        address = f'http://127.0.0.1:{server.getsockname()[1]}/a.ts'
        atom = lambda name,data: struct.pack('>I', 8+len(data))+name+data
        url = b'\0\0\0\0url '+struct.pack('>I', len(address)+1)+address.encode()+b'\0'
        refers = atom(b'ftyp', b'qt  \0\0\0\0qt  ')+atom(b'moov', atom(b'rmra', atom(b'rmda', atom(b'rdrf', url))))
        dash = ('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
            'profiles="urn:mpeg:dash:profile:isoff-live:2011" type="static"><Period>'
            '<AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1">'
            f'<BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>')
        texts = [
            f'#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{address}\n',
            f'ffconcat version 1.0\nfile {address}\n',
            f'[Reference]\nRef1={address}\n',
            f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
            dash]
        films = []
        for k,data in enumerate((*(o.encode() for o in texts),refers)):
            for kind in (*KINDS,'m3u8','txt','mpd'):
                films.append(Film(tmp_path/f'{k}.{kind}'))
                films[-1].path.write_bytes(data)
        reasons = [o.reason for o,_ in tried(films)]
        assert all(o.startswith('not a readable video') for o in reasons), reasons
        with pytest.raises(TimeoutError): server.accept()
