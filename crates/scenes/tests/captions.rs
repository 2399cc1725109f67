//! Captions are sentences, mostly true, in words that are known beforehand.

use std::collections::BTreeSet;

use cliptune_scenes::{Picture, Style, Task, Wording, World, caption, vocabulary};

fn pictures(count: u64) -> Vec<Picture> {
    World::training().pictures(11, 0..count)
}

/// Several captions for each picture.
fn captions(pictures: &[Picture], wording: &Wording, each: u64) -> Vec<String> {
    let of = |(i, picture): (u64, &Picture)| {
        (0..each)
            .map(move |k| (i, k, picture.clone()))
            .collect::<Vec<_>>()
    };
    let drawn = (0..).zip(pictures).flat_map(of);
    drawn
        .map(|(i, k, picture)| caption(&picture.scene, wording, 1, i * each + k))
        .collect()
}

fn words(sentence: &str) -> Vec<String> {
    let spaced = sentence.replace(',', " , ").replace('.', " . ");
    spaced.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn the_vocabulary_is_what_captions_and_classes_use() {
    let known: BTreeSet<String> = vocabulary().into_iter().collect();
    let mut seen = BTreeSet::new();
    for caption in captions(&pictures(4000), &Wording::full(), 30) {
        seen.extend(words(&caption));
    }
    let unknown: Vec<_> = seen.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    for task in Task::ALL {
        for class in task.classes() {
            let prompt = task.template().replace("{}", &class);
            seen.extend(words(&prompt));
            assert!(words(&prompt).iter().all(|w| known.contains(w)), "{prompt}");
        }
    }
    let unused: Vec<_> = known.difference(&seen).collect();
    assert!(unused.len() < 20, "{unused:?}");
}

#[test]
fn captions_are_sentences() {
    for caption in captions(&pictures(2000), &Wording::full(), 5) {
        let clean = caption
            .chars()
            .all(|c| c.is_ascii_lowercase() || " ,.".contains(c));
        assert!(
            clean && !caption.contains("  ") && caption.trim() == caption && !caption.is_empty(),
            "{caption}"
        );
        assert!(
            !caption.trim_end_matches('.').contains('.') && !caption.contains(" ,"),
            "{caption}"
        );
        let words = words(&caption);
        for pair in words.windows(2) {
            let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
            assert!(pair[0] != "a" || !vowel, "{caption}");
            assert!(pair[0] != "an" || vowel, "{caption}");
            assert_ne!(pair[0], pair[1], "{caption}");
        }
        for word in words {
            assert!(
                !["left", "right", "top", "bottom", "centre"].contains(&word.as_str()),
                "{caption}"
            );
        }
    }
}

#[test]
fn plain_words_of_single_objects_are_mostly_right() {
    let singles: Vec<Picture> = pictures(3000)
        .into_iter()
        .filter(|p| p.scene.objects.len() == 1)
        .collect();
    let named = |wording: &Wording| {
        let captions = captions(&singles, wording, 1);
        let right = captions.iter().zip(&singles).filter(|(caption, picture)| {
            words(caption).contains(&picture.scene.objects[0].shape.word().to_owned())
        });
        right.count() as f32 / singles.len() as f32
    };
    assert_eq!(named(&Wording::simple()), 1.0);
    let share = named(&Wording::full());
    assert!((0.6..0.75).contains(&share), "{share}");
}

#[test]
fn rare_things_are_said_rarely() {
    let pictures = pictures(4000);
    let all = captions(&pictures, &Wording::full(), 5);
    let share =
        |of: &dyn Fn(&str) -> bool| all.iter().filter(|c| of(c)).count() as f32 / all.len() as f32;
    let varieties: Vec<String> = Task::Variety.classes();
    let with_variety = share(&|c| words(c).iter().any(|w| varieties.contains(w)));
    assert!((0.003..0.015).contains(&with_variety), "{with_variety}");
    let with_background = share(&|c| c.contains("background"));
    assert!(
        (0.035..0.065).contains(&with_background),
        "{with_background}"
    );
    let styled = share(&|c| c.contains("sketch") || c.contains("line drawing"));
    assert!((0.001..0.01).contains(&styled), "{styled}");
}

#[test]
fn colours_that_cannot_be_seen_are_not_said() {
    for picture in pictures(3000) {
        if picture.scene.style == Style::Grey {
            let caption = caption(&picture.scene, &Wording::simple(), 1, 1);
            assert!(
                !words(&caption).contains(&picture.scene.objects[0].color.word().to_owned()),
                "{caption}"
            );
        }
    }
}

#[test]
fn the_same_scene_is_told_in_many_ways() {
    let scene = &pictures(1)[0].scene;
    let told: BTreeSet<String> = (0..200)
        .map(|i| caption(scene, &Wording::full(), 1, i))
        .collect();
    assert!(told.len() > 60, "{}", told.len());
    assert_eq!(
        caption(scene, &Wording::full(), 1, 5),
        caption(scene, &Wording::full(), 1, 5)
    );
}
