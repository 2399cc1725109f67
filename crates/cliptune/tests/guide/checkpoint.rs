//! A checkpoint as `torch.save` writes it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_core::Tensor;
use cliptune::files::write_atomically;
use cliptune::prompt_file::PromptFile;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// The parts of models that their authors save in a folder each, by what the keys begin with.
const PARTS: [&str; 3] = [
    "image_encoder.transformer.ctx_learner",
    "image_encoder.transformer.extractor",
    "prompt_learner",
];

/// Writes the learned tensors of a prompt file under `state_dict`, as Dassl does: into `path`, or, if that has no extension,
/// each of the model's parts into a folder of its own below it.
pub(crate) fn write(prompt: &Path, path: &Path) {
    let tensors = PromptFile::load(prompt).unwrap().tensors;
    if path.extension().is_some() {
        return write_file(&tensors, path);
    }
    for part in PARTS {
        let of_part = tensors.iter().filter_map(|(name, tensor)| {
            let name = name.strip_prefix(part)?.strip_prefix('.')?;
            Some((name.to_owned(), tensor.clone()))
        });
        let (folder, file) = (path.join(part), "model.pth.tar-60");
        std::fs::create_dir_all(&folder).unwrap();
        write_file(&of_part.collect(), &folder.join(file));
        let newest = folder.join("checkpoint");
        write_atomically(&newest, |out| writeln!(out, "{file}")).unwrap();
    }
}

fn write_file(tensors: &BTreeMap<String, Tensor>, file: &Path) {
    // Protocol 2: a dict with a dict; `(` to `u` adds pairs.
    let mut pickle = b"\x80\x02}(".to_vec();
    text(&mut pickle, "state_dict");
    pickle.extend(b"}(");
    let mut storages = Vec::new();
    for (place, (name, tensor)) in tensors.iter().enumerate() {
        let numbers: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        text(&mut pickle, name);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(b"ctorch\nFloatStorage\n");
        text(&mut pickle, &place.to_string());
        text(&mut pickle, "cpu");
        int(&mut pickle, numbers.len());
        pickle.extend(b"tQ");
        int(&mut pickle, 0);
        tuple(&mut pickle, tensor.dims());
        tuple(&mut pickle, tensor.contiguous().unwrap().stride());
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        storages.push(numbers);
    }
    pickle.extend(b"uu.");
    write_atomically(file, |out| {
        let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file("archive/data.pkl", SimpleFileOptions::default())?;
        zip.write_all(&pickle)?;
        for (place, numbers) in storages.iter().enumerate() {
            zip.start_file(
                format!("archive/data/{place}"),
                SimpleFileOptions::default(),
            )?;
            for number in numbers {
                zip.write_all(&number.to_le_bytes())?;
            }
        }
        out.write_all(&zip.finish()?.into_inner())
    })
    .unwrap();
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.as_bytes());
}

fn int(pickle: &mut Vec<u8>, value: usize) {
    pickle.push(b'J');
    pickle.extend((value as i32).to_le_bytes());
}

fn tuple(pickle: &mut Vec<u8>, values: &[usize]) {
    pickle.push(b'(');
    values.iter().for_each(|value| int(pickle, *value));
    pickle.push(b't');
}
