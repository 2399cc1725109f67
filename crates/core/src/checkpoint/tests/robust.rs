//! Damaged and hostile files: always a checkpoint or an error that names the file.

use proptest::prelude::*;

use super::writers::{Pickle, legacy, numbers, zip, zip_of};
use super::*;

/// Opens a file with this content in every way there is.
fn open_bytes(content: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    put(&path, content);
    let opened = Checkpoint::open(&path).map(|_| ());
    let state = read_torch_state(&path).map(|_| ());
    for result in [&opened, &state] {
        if let Err(error) = result {
            let error = error.to_string();
            assert!(
                error.contains("weights.bin"),
                "the file is not named: {error}"
            );
            assert!(error.len() < 2000, "a message of {} bytes", error.len());
        }
    }
    opened.map_err(|e| e.to_string())
}

fn small() -> BTreeMap<String, Tensor> {
    let checkpoint = random(&vit(), 1).unwrap();
    checkpoint
        .tensors
        .iter()
        .map(|(name, t)| (name.clone(), t.to_dtype(DType::F16).unwrap()))
        .collect()
}

/// One valid file of each format, and the pickle of each zip.
struct Corpus {
    files: Vec<Vec<u8>>,
    pickles: Vec<Vec<u8>>,
    storages: Vec<Vec<u8>>,
    header: Vec<u8>,
}

static CORPUS: std::sync::LazyLock<Corpus> = std::sync::LazyLock::new(|| {
    let tensors = small();
    let plain = Pickle::new().state_dict(&tensors, "", false).stop();
    let script = Pickle::new().modules(&tensors).stop();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let checkpoint = Checkpoint {
        tensors: tensors.clone(),
        ..random(&vit(), 1).unwrap()
    };
    checkpoint.save(Layout::Safetensors, None, &path).unwrap();
    let single = std::fs::read(&path).unwrap();
    let header = single
        [..8 + usize::try_from(u64::from_le_bytes(single[..8].try_into().unwrap())).unwrap()]
        .to_vec();
    Corpus {
        files: vec![
            zip_of(&plain, &tensors, true),
            zip_of(&script, &tensors, false),
            legacy(&tensors),
            single,
        ],
        pickles: vec![plain, script],
        storages: tensors.values().map(numbers).collect(),
        header,
    }
});

#[derive(Clone, Debug)]
enum Damage {
    Cut(prop::sample::Index),
    Set(Vec<(prop::sample::Index, u8)>),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
}

impl Damage {
    fn any() -> impl Strategy<Value = Self> {
        let at = any::<prop::sample::Index>;
        prop_oneof![
            at().prop_map(Self::Cut),
            prop::collection::vec((at(), any::<u8>()), 1..4).prop_map(Self::Set),
            (at(), prop::collection::vec(any::<u8>(), 1..12)).prop_map(|(i, b)| Self::Insert(i, b)),
            (at(), 1usize..40).prop_map(|(i, n)| Self::Remove(i, n)),
        ]
    }

    /// Does the damage within `range` of the content, where the format's own structure is.
    fn apply(&self, content: &mut Vec<u8>, range: std::ops::Range<usize>) {
        let place = |i: &prop::sample::Index| range.start + i.index(range.len());
        match self {
            Self::Cut(i) => content.truncate(place(i)),
            Self::Set(bytes) => bytes.iter().for_each(|(i, b)| content[place(i)] = *b),
            Self::Insert(i, bytes) => {
                let i = place(i);
                content.splice(i..i, bytes.iter().copied());
            }
            Self::Remove(i, n) => {
                let i = place(i);
                content.drain(i..(i + n).min(range.end));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(start in prop::sample::select(vec![&b""[..], b"PK\x03\x04", LEGACY, b"\x20\0\0\0\0\0\0\0{\"", b"\x80\x02"]), rest: Vec<u8>) {
        prop_assert!(open_bytes(&[start, &rest].concat()).is_err());
    }

    #[test]
    fn damaged_files(which in 0usize..4, damage in Damage::any(), part in 0usize..3) {
        let mut content = CORPUS.files[which].clone();
        let len = content.len();
        // Formats have their structure at one of the ends.
        damage.apply(&mut content, [0..6000, len - 6000..len, 0..len][part].clone());
        let result = open_bytes(&content);
        if matches!(damage, Damage::Cut(_)) {
            prop_assert!(result.is_err());
        }
    }

    #[test]
    fn damaged_pickles_in_sound_archives(which in 0usize..2, damage in Damage::any()) {
        let mut pickle = CORPUS.pickles[which].clone();
        let len = pickle.len();
        damage.apply(&mut pickle, 0..len);
        let _ = open_bytes(&zip(&pickle, &CORPUS.storages, false, "little"));
    }

    #[test]
    fn damaged_headers_of_the_right_length(damage in Damage::any()) {
        let mut content = CORPUS.files[3].clone();
        let mut header = CORPUS.header[8..].to_vec();
        let len = header.len();
        damage.apply(&mut header, 0..len);
        let prefix = (header.len() as u64).to_le_bytes();
        content.splice(..len + 8, prefix.into_iter().chain(header));
        let _ = open_bytes(&content);
    }

    #[test]
    fn damaged_configs(hf: bool, damage in Damage::any()) {
        let (from, config, weights) = match hf {
            true => ("clip/micro-vit/hf", "config.json", "model.safetensors"),
            false => ("clip/micro-vit/open_clip", "open_clip_config.json", "open_clip_model.safetensors"),
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(from).join(weights), dir.path().join(weights)).unwrap();
        let mut content = std::fs::read(fixture(from).join(config)).unwrap();
        let len = content.len();
        damage.apply(&mut content, 0..len);
        put(&dir.path().join(config), &content);
        if let Err(error) = Checkpoint::open(dir.path()) {
            prop_assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{}", error);
        }
    }
}

const LEGACY: &[u8] = super::super::torch::LEGACY_MAGIC;

/// What opening says of a state dict whose only entry is made by `value`, with one storage.
fn entry(value: impl FnOnce(Pickle) -> Pickle, storage: Vec<u8>, deflate: bool) -> String {
    let pickle = value(Pickle::new().raw(b"}(").text("visual.proj"))
        .raw(b"u")
        .stop();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    put(&path, &zip(&pickle, &[storage], deflate, "little"));
    read_torch_state(&path).unwrap_err().to_string()
}

#[test]
fn a_class_in_place_of_a_tensor_is_named_and_not_run() {
    let marker = std::env::temp_dir().join(format!("cliptune-pickle-{}", std::process::id()));
    let run = format!("touch {}", marker.display());
    let error = entry(
        |p| p.raw(b"cposix\nsystem\n").text(&run).raw(b"\x85R"),
        vec![],
        false,
    );
    assert!(
        error.contains("entry `visual.proj`: is a `posix.system`, expected a tensor"),
        "{error}"
    );
    assert!(!marker.exists());
}

#[test]
fn windows_must_fit_their_storage() {
    let window = |len: usize, window: (usize, &[usize], &[usize]), storage: usize| {
        entry(
            |p| p.tensor("FloatStorage", "0", len, window, false),
            vec![0; storage],
            false,
        )
    };
    let huge = usize::MAX / 2;
    for (len, w, storage) in [
        (4, (1, &[2, 2][..], &[2, 1][..]), 16),
        (4, (0, &[1000, 1000], &[0, 0]), 16),
        (4, (0, &[huge, huge], &[1, 1]), 16),
        (4, (huge, &[2], &[huge]), 16),
        (4, (0, &[4], &[1, 1]), 16),
        (huge, (0, &[2], &[1]), 16),
        (4, (0, &[4], &[1]), 15),
        (4, (0, &[4], &[1]), 20),
        (1 << 40, (0, &[1 << 40], &[1]), 16),
    ] {
        let error = window(len, w, storage);
        assert!(error.contains("weights.bin"), "{error}");
    }
    // An axis of length 1 may have any stride.
    let pickle = Pickle::new()
        .raw(b"}(")
        .text("a")
        .tensor(
            "FloatStorage",
            "0",
            2,
            (0, &[1, 1, 1, 2, 1], &[huge, huge, huge, 1, 9]),
            false,
        )
        .raw(b"u")
        .stop();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w");
    put(&path, &zip(&pickle, &[vec![0; 8]], false, "little"));
    assert_eq!(
        read_torch_state(&path).unwrap().tensors["a"].dims(),
        [1, 1, 1, 2, 1]
    );
}

#[test]
fn a_file_that_unpacks_without_bound_is_refused() {
    let numel = 8 << 20;
    let error = entry(
        |p| p.tensor("FloatStorage", "0", numel, (0, &[numel], &[1]), false),
        vec![0; numel * 4],
        true,
    );
    assert!(error.contains("64 times larger than the file"), "{error}");
    // Many windows on one storage.
    let numel = 1 << 20;
    let shape = (0, &[numel - 1][..], &[1][..]);
    let mut pickle = Pickle::new().raw(b"}(");
    for i in 0..300 {
        pickle = pickle
            .text(&i.to_string())
            .tensor("ByteStorage", "0", numel, shape, false);
    }
    let content = zip(&pickle.raw(b"u").stop(), &[vec![1; numel]], false, "little");
    let error = open_bytes(&content).unwrap_err();
    assert!(error.contains("no CLIP image tower"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w");
    put(&path, &content);
    let error = read_torch_state(&path).unwrap_err().to_string();
    assert!(error.contains("64 times larger than the file"), "{error}");
}

#[test]
fn modules_that_share_children_without_end_are_refused() {
    // Each level holds the next one twice: 2^60 paths.
    let mut pickle = Pickle::new();
    for _ in 0..60 {
        pickle = pickle.raw(b"c__torch__\nM\n)\x81}(").text("a");
    }
    pickle = pickle.raw(b"N");
    for i in 0..60u8 {
        pickle = pickle.raw(&[b'q', i]).text("b").raw(&[b'h', i]).raw(b"ub");
    }
    let error = open_bytes(&zip(&pickle.stop(), &[], false, "little")).unwrap_err();
    assert!(error.contains("modules with more than"), "{error}");
}

#[test]
fn files_of_other_kinds_are_told_apart() {
    for (content, expected) in [
        (b"".to_vec(), "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\n".to_vec(),
            "Git LFS pointer",
        ),
        (b"\x80\x02}.".to_vec(), "a bare pickle"),
        (
            b"hello".to_vec(),
            "neither a PyTorch file nor a safetensors file",
        ),
        (
            zip(b"\x80\x02ctorch.nn\nLinear\n)\x81.", &[], false, "little"),
            "holds a pickled `torch.nn.Linear`, expected a state dict",
        ),
        (zip(b"\x80\x02}.", &[], false, "big"), "big-endian"),
        (
            zip(b"\x80\x02}", &[], false, "little"),
            "the pickle is truncated",
        ),
        (u64::MAX.to_le_bytes().to_vec(), "neither a PyTorch file"),
    ] {
        let error = open_bytes(&content).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("a folder without config.json"), "{error}");
    put(&dir.path().join("config.json"), b"{}");
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("no weights found, looked for model.safetensors"),
        "{error}"
    );
}
