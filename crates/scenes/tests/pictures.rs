//! Pictures are what their scenes say, everywhere and always the same.

use cliptune_scenes::{
    Layout, Object, Picture, SIDE, Scene, Shape, Style, Task, Wording, World, caption, multi_label,
};
use proptest::prelude::*;

/// FNV-1a, enough to notice any change.
fn hash(pictures: &[Picture]) -> u64 {
    let bytes = pictures.iter().flat_map(|p| p.rgb.iter().chain(&p.mask));
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

fn training(count: u64) -> Vec<Picture> {
    World::training().pictures(3, 0..count)
}

/// Two pictures of each class of each task.
fn of_tasks() -> Vec<Picture> {
    let draw = |task: Task| {
        (0..task.classes().len()).flat_map(move |class| [0, 1].map(|i| task.picture(5, class, i)))
    };
    Task::ALL.into_iter().flat_map(draw).collect()
}

/// Published results name pictures by seed and index only: a change of these hashes changes every one of them.
#[test]
fn pictures_have_the_same_bits_on_every_machine() {
    let multi_label: Vec<_> = (0..50).map(|i| multi_label(3, i)).collect();
    let hashes = [&training(300), &of_tasks(), &multi_label].map(|pictures| hash(pictures));
    assert_eq!(hashes, HASHES);
}

const HASHES: [u64; 3] = [
    15_881_693_116_427_202_924,
    7_896_763_332_306_980_645,
    9_889_325_257_823_198_737,
];

/// The built-in CLIP learned from these words.
#[test]
fn captions_are_the_same_everywhere() {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for (index, picture) in (0..).zip(training(300)) {
        let words = caption(&picture.scene, &Wording::full(), 1, index);
        for byte in words.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    assert_eq!(hash, 16_837_737_171_449_405_870);
}

#[test]
fn a_picture_depends_on_seed_and_index_alone() {
    let world = World::training();
    assert_eq!(world.picture(1, 7), world.pictures(1, 5..9)[2]);
    assert_ne!(world.picture(1, 7).rgb, world.picture(2, 7).rgb);
    assert_ne!(world.picture(1, 7).rgb, world.picture(1, 8).rgb);
    assert_eq!(Task::Color.picture(1, 2, 3), Task::Color.picture(1, 2, 3));
    assert_ne!(
        Task::Color.picture(1, 2, 3).rgb,
        Task::Shape.picture(1, 2, 3).rgb
    );
}

#[test]
fn masks_agree_with_objects() {
    let pictures = training(500)
        .into_iter()
        .chain(of_tasks())
        .chain((0..100).map(|i| multi_label(1, i)));
    for picture in pictures {
        assert_eq!(
            (picture.rgb.len(), picture.mask.len()),
            (3 * SIDE * SIDE, SIDE * SIDE)
        );
        for (object, label) in picture.scene.objects.iter().zip(1..) {
            let pixels: Vec<usize> = (0..SIDE * SIDE)
                .filter(|&at| picture.mask[at] == label)
                .collect();
            let least = 0.12 * object.radius * object.radius;
            assert!(
                pixels.len() as f32 >= least,
                "{} pixels of {object:?}",
                pixels.len()
            );
            assert!(pixels.iter().all(|&at| covers(object, at)), "{object:?}");
        }
        let n_objects = picture.scene.objects.len();
        assert!(
            picture
                .mask
                .iter()
                .all(|&label| usize::from(label) <= n_objects)
        );
    }
}

/// Whether a pixel is within the object's circle, stretched as the object is.
fn covers(object: &Object, at: usize) -> bool {
    let (x, y) = ((at % SIDE) as f32 + 0.5, (at / SIDE) as f32 + 0.5);
    distance((x, y), object.center) <= 1.08 * object.radius + 1.0
}

fn distance(a: (f32, f32), b: (f32, f32)) -> f32 {
    ((a.0 - b.0) * (a.0 - b.0) + (a.1 - b.1) * (a.1 - b.1)).sqrt()
}

#[test]
fn objects_lie_inside_and_apart() {
    for picture in training(1000) {
        let objects = &picture.scene.objects;
        for (i, a) in objects.iter().enumerate() {
            let inside = |c: f32| c >= a.radius && c <= SIDE as f32 - a.radius;
            assert!(inside(a.center.0) && inside(a.center.1), "{a:?}");
            for b in &objects[..i] {
                assert!(
                    distance(a.center, b.center) >= a.radius + b.radius,
                    "{a:?} {b:?}"
                );
            }
        }
    }
}

#[test]
fn the_training_world_has_its_shares() {
    let scenes: Vec<Scene> = training(4000).into_iter().map(|p| p.scene).collect();
    let share = |of: &dyn Fn(&Scene) -> bool| {
        scenes.iter().filter(|s| of(s)).count() as f32 / scenes.len() as f32
    };
    let near = |of: &dyn Fn(&Scene) -> bool, wanted: f32| {
        assert!((share(of) - wanted).abs() < 0.03, "{} {wanted}", share(of))
    };
    near(&|s| s.layout == Layout::Single, 0.55);
    near(&|s| s.layout == Layout::Same, 0.17);
    near(&|s| s.style != Style::Plain, 0.1);
    near(&|s| s.texture == cliptune_scenes::Texture::Plain, 0.3);
    near(&|s| !s.pale, 0.3);
    for shape in Shape::ALL {
        assert!(share(&|s| s.objects[0].shape == shape) > 0.015, "{shape:?}");
    }
}

#[test]
fn objects_of_a_layout_are_equal_or_different() {
    for scene in training(500).into_iter().map(|p| p.scene) {
        let shapes: Vec<Shape> = scene.objects.iter().map(|o| o.shape).collect();
        let first = shapes[0];
        match scene.layout {
            Layout::Single => assert_eq!(shapes.len(), 1),
            Layout::Same => {
                assert!((2..=6).contains(&shapes.len()) && shapes.iter().all(|&s| s == first));
            }
            Layout::Multi => {
                let different = (1..shapes.len()).all(|i| !shapes[..i].contains(&shapes[i]));
                assert!((2..=4).contains(&shapes.len()) && different);
            }
        }
    }
}

/// What the scene says about a task, as a class name.
fn answer(task: Task, scene: &Scene) -> String {
    let object = &scene.objects[0];
    match task {
        Task::Shape => object.shape.word().into(),
        Task::Small => {
            assert!(object.radius <= 9.0, "{object:?}");
            object.shape.word().into()
        }
        Task::RotatedVariety => {
            assert_eq!(scene.style, Style::Rotated);
            object.variety_word().unwrap_or_default().into()
        }
        Task::Mixed => ["one", "two", "three", "four"][scene.objects.len() - 1].into(),
        Task::Color => object.color.word().into(),
        Task::Pattern => object.pattern.word().into(),
        Task::Count => {
            ["one", "two", "three", "four", "five", "six"][scene.objects.len() - 1].into()
        }
        Task::ColorShape => format!("{} {}", object.color.word(), object.shape.word()),
        Task::Kind => object.shape.kind().word().into(),
        Task::Ground => scene.ground.word().into(),
        Task::Texture => scene.texture.word().into(),
        Task::Variety => object.variety_word().unwrap_or_default().into(),
        Task::Style => scene.style.word().into(),
        Task::Place => object.place().word().into(),
        Task::Styled(style) => {
            assert_eq!(scene.style, style);
            object.shape.word().into()
        }
    }
}

#[test]
fn labels_agree_with_scenes() {
    for task in Task::ALL {
        for (class, name) in task.classes().into_iter().enumerate() {
            for index in 0..20 {
                let scene = task.picture(9, class, index).scene;
                assert_eq!(answer(task, &scene), name, "{task:?} {scene:?}");
            }
        }
    }
}

#[test]
fn tasks_have_names_and_different_classes() {
    let counts = [
        36, 10, 8, 6, 50, 10, 10, 6, 24, 7, 5, 36, 36, 36, 36, 36, 36, 36, 24, 4,
    ];
    for (task, count) in Task::ALL.into_iter().zip(counts) {
        assert_eq!(Task::from_slug(&task.slug()), Some(task));
        assert!(task.about().ends_with('.') && task.template().contains("{}"));
        let mut classes = task.classes();
        assert_eq!(classes.len(), count);
        classes.sort();
        classes.dedup();
        assert_eq!(classes.len(), count, "{task:?}");
    }
    assert_eq!(Task::from_slug("nothing"), None);
}

#[test]
#[should_panic(expected = "class 36 of 36 of task `shape`")]
fn there_is_no_picture_of_a_class_that_is_not() {
    Task::Shape.picture(1, 36, 0);
}

#[test]
fn multi_label_pictures_show_different_shapes() {
    for index in 0..200 {
        let scene = multi_label(1, index).scene;
        assert!(scene.layout == Layout::Multi && (2..=4).contains(&scene.objects.len()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_seed_and_index_will_do(seed: u64, index: u64, class: usize) {
        let picture = World::training().picture(seed, index);
        prop_assert!(!caption(&picture.scene, &Wording::full(), seed, index).is_empty());
        multi_label(seed, index);
        for task in Task::ALL {
            task.picture(seed, class % task.classes().len(), index);
        }
    }

    #[test]
    fn any_world_can_be_drawn(
        layouts in prop::array::uniform3(0.0f32..1.0),
        low in 4.0f32..30.0,
        more in 0.0f32..1.0,
        shares in prop::array::uniform3(0.0f32..1.0),
        index: u64,
    ) {
        let [saturated, plain_ground, styled] = shares;
        let world = World { layouts, radius: (low, low + more), saturated, plain_ground, styled };
        let picture = world.picture(1, index);
        prop_assert!(!picture.scene.objects.is_empty());
    }
}
