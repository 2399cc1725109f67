//! Classification tasks: classes, prompts and any number of pictures of a class.

use crate::stream::Stream;
use crate::world::{Wish, draw};
use crate::{Color, Kind, Layout, Pattern, Picture, Place, Shape, Style, Texture};

/// A classification task of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// The shape of one object, 36 classes.
    Shape,
    /// The colour of one object, 10 classes.
    Color,
    /// The pattern of one object, 8 classes.
    Pattern,
    /// The number of equal objects, one to six.
    Count,
    /// Colour and shape together, 5 × 10 classes.
    ColorShape,
    /// The kind of one object, 10 classes.
    Kind,
    /// The colour of the ground, 10 classes.
    Ground,
    /// The texture of the ground, 6 classes.
    Texture,
    /// The variety of one object, 24 classes.
    Variety,
    /// The style of the picture, 7 classes.
    Style,
    /// The place of one object, 5 classes.
    Place,
    /// The shape of one object, all pictures in one style; not defined for [`Style::Plain`], which is [`Task::Shape`].
    Styled(Style),
    /// The shape of one object that is a few pixels wide, 36 classes.
    Small,
    /// The variety of one object that is turned by a quarter or a half, 24 classes.
    RotatedVariety,
    /// The number of different objects, one to four.
    Mixed,
}

/// Colours of [`Task::ColorShape`].
const PAIR_COLORS: [Color; 5] = [
    Color::Red,
    Color::Yellow,
    Color::Green,
    Color::Blue,
    Color::Purple,
];
/// Shapes of [`Task::ColorShape`].
const PAIR_SHAPES: [Shape; 10] = [
    Shape::Circle,
    Shape::Triangle,
    Shape::Arrow,
    Shape::Star,
    Shape::Heart,
    Shape::Tree,
    Shape::Fish,
    Shape::Moon,
    Shape::Key,
    Shape::House,
];
/// The numbers that captions and [`Task::Count`] use.
pub(crate) const NUMBERS: [&str; 6] = ["one", "two", "three", "four", "five", "six"];

impl Task {
    /// All tasks.
    pub const ALL: [Self; 20] = [
        Self::Shape,
        Self::Color,
        Self::Pattern,
        Self::Count,
        Self::ColorShape,
        Self::Kind,
        Self::Ground,
        Self::Texture,
        Self::Variety,
        Self::Style,
        Self::Place,
        Self::Styled(Style::Sketch),
        Self::Styled(Style::Noise),
        Self::Styled(Style::Blur),
        Self::Styled(Style::Inverted),
        Self::Styled(Style::Rotated),
        Self::Styled(Style::Grey),
        Self::Small,
        Self::RotatedVariety,
        Self::Mixed,
    ];

    /// A short name for files and command lines, such as `"color"` or `"shape-sketch"`.
    pub fn slug(self) -> String {
        match self {
            Self::Shape | Self::Styled(Style::Plain) => "shape".into(),
            Self::Color => "color".into(),
            Self::Pattern => "pattern".into(),
            Self::Count => "count".into(),
            Self::ColorShape => "color-shape".into(),
            Self::Kind => "kind".into(),
            Self::Ground => "ground".into(),
            Self::Texture => "texture".into(),
            Self::Variety => "variety".into(),
            Self::Style => "style".into(),
            Self::Place => "place".into(),
            Self::Styled(style) => format!("shape-{}", style.word()),
            Self::Small => "small".into(),
            Self::RotatedVariety => "variety-rotated".into(),
            Self::Mixed => "mixed".into(),
        }
    }

    /// The task with this [`slug`](Self::slug).
    pub fn from_slug(slug: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.slug() == slug)
    }

    /// A title for tables.
    pub fn title(self) -> String {
        match self {
            Self::Shape | Self::Styled(Style::Plain) => "Shapes".into(),
            Self::Color => "Colours".into(),
            Self::Pattern => "Patterns".into(),
            Self::Count => "Counting".into(),
            Self::ColorShape => "Coloured shapes".into(),
            Self::Kind => "Kinds".into(),
            Self::Ground => "Ground colours".into(),
            Self::Texture => "Ground textures".into(),
            Self::Variety => "Varieties".into(),
            Self::Style => "Styles".into(),
            Self::Place => "Places".into(),
            Self::Styled(Style::Sketch) => "Sketched shapes".into(),
            Self::Styled(Style::Noise) => "Noisy shapes".into(),
            Self::Styled(Style::Blur) => "Blurry shapes".into(),
            Self::Styled(Style::Inverted) => "Inverted shapes".into(),
            Self::Styled(Style::Rotated) => "Rotated shapes".into(),
            Self::Styled(Style::Grey) => "Greyscale shapes".into(),
            Self::Small => "Small shapes".into(),
            Self::RotatedVariety => "Rotated varieties".into(),
            Self::Mixed => "Counting different things".into(),
        }
    }

    /// What the task asks, in one sentence.
    pub fn about(self) -> &'static str {
        match self {
            Self::Shape | Self::Styled(Style::Plain) => {
                "Which of 36 shapes the one object in the picture is."
            }
            Self::Color => "Which of 10 colours the object has.",
            Self::Pattern => "Which of 8 patterns covers the object.",
            Self::Count => "How many equal objects there are, from one to six.",
            Self::ColorShape => {
                "Which of 5 colours and which of 10 shapes the object has, both to be right."
            }
            Self::Kind => "Which of 10 kinds, each of several shapes, the object belongs to.",
            Self::Ground => {
                "Which of 10 colours the ground behind the object has; captions seldom say it."
            }
            Self::Texture => {
                "Which of 6 textures the ground behind the object has; captions hardly ever say it."
            }
            Self::Variety => {
                "Which of 24 varieties of 8 shapes the object is; captions hardly ever use these names."
            }
            Self::Style => "In which of 7 styles the picture is rendered.",
            Self::Place => {
                "Whether the object is on the left, on the right, at the top, at the bottom or in the centre; captions never say it."
            }
            Self::Styled(Style::Sketch) => "The 36 shapes drawn as dark outlines on paper.",
            Self::Styled(Style::Noise) => "The 36 shapes under strong pixel noise.",
            Self::Styled(Style::Blur) => "The 36 shapes, blurred.",
            Self::Styled(Style::Inverted) => "The 36 shapes as negatives.",
            Self::Styled(Style::Rotated) => "The 36 shapes turned by 90, 180 or 270 degrees.",
            Self::Styled(Style::Grey) => "The 36 shapes without colours.",
            Self::Small => {
                "Which of 36 shapes an object of 12 to 18 pixels is; training shows few as small."
            }
            Self::RotatedVariety => {
                "The 24 varieties turned by 90, 180 or 270 degrees; captions hardly ever use these names."
            }
            Self::Mixed => {
                "How many different objects there are, from one to four; captions list them and do not count."
            }
        }
    }

    /// The names of the classes, in the order of their labels.
    pub fn classes(self) -> Vec<String> {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        match self {
            Self::Shape | Self::Styled(_) | Self::Small => owned(&Shape::ALL.map(Shape::word)),
            Self::Color | Self::Ground => owned(&Color::ALL.map(Color::word)),
            Self::Pattern => owned(&Pattern::ALL.map(Pattern::word)),
            Self::Count => owned(&NUMBERS),
            Self::Mixed => owned(&NUMBERS[..4]),
            Self::ColorShape => pairs()
                .map(|(c, s)| format!("{} {}", c.word(), s.word()))
                .collect(),
            Self::Kind => owned(&Kind::ALL.map(Kind::word)),
            Self::Texture => owned(&Texture::ALL.map(Texture::word)),
            Self::Variety | Self::RotatedVariety => varieties()
                .map(|(shape, form)| shape.varieties()[form].to_owned())
                .collect(),
            Self::Style => owned(&Style::ALL.map(Style::word)),
            Self::Place => owned(&Place::ALL.map(Place::word)),
        }
    }

    /// The prompt; `{}` stands for the class.
    pub fn template(self) -> &'static str {
        match self {
            Self::Color | Self::Pattern => "a photo of a {} object.",
            Self::Count | Self::Mixed => "a photo of {} objects.",
            Self::Ground | Self::Texture => "a photo of an object on a {} background.",
            Self::Style => "a {} picture.",
            Self::Place => "a photo of an object at the {}.",
            _ => "a photo of a {}.",
        }
    }

    /// Picture `index` of a class; the same bits wherever it is drawn.
    ///
    /// # Panics
    /// If `class` is not less than the number of [`classes`](Self::classes).
    pub fn picture(self, seed: u64, class: usize, index: u64) -> Picture {
        let n_classes = self.classes().len();
        assert!(
            class < n_classes,
            "class {class} of {n_classes} of task `{}`",
            self.slug()
        );
        // Tasks have streams of their own: the counter holds the task and the class.
        let stream = (self.number() << 32) | class as u64;
        draw(seed, [index, stream], |stream| self.wish(class, stream))
    }

    /// The place in [`ALL`](Self::ALL).
    fn number(self) -> u64 {
        Self::ALL.iter().position(|&task| task == self).unwrap_or(0) as u64
    }

    fn wish(self, class: usize, stream: &mut Stream) -> Wish {
        let any = Wish::default();
        match self {
            Self::Shape => Wish {
                shapes: vec![Shape::ALL[class]],
                ..any
            },
            Self::Color => Wish {
                colors: vec![Color::ALL[class]],
                ..any
            },
            Self::Pattern => Wish {
                pattern: Some(Pattern::ALL[class]),
                ..any
            },
            Self::Count => Wish {
                layout: Layout::Same,
                count: 1 + class,
                ..any
            },
            Self::ColorShape => {
                let (color, shape) = (
                    PAIR_COLORS[class / PAIR_SHAPES.len()],
                    PAIR_SHAPES[class % PAIR_SHAPES.len()],
                );
                Wish {
                    shapes: vec![shape],
                    colors: vec![color],
                    ..any
                }
            }
            Self::Kind => Wish {
                shapes: Kind::ALL[class].shapes(),
                ..any
            },
            // Neither so pale that the colour is lost nor so strong that nothing else in training looks like it.
            Self::Ground => Wish {
                ground: Some(Color::ALL[class]),
                white: Some((0.1, 0.45)),
                ..any
            },
            Self::Texture => Wish {
                texture: Some(Texture::ALL[class]),
                ..any
            },
            Self::Variety | Self::RotatedVariety => {
                let all: Vec<_> = varieties().collect();
                let (shape, form) = all[class];
                let style = match self {
                    Self::RotatedVariety => Style::Rotated,
                    _ => Style::Plain,
                };
                Wish {
                    shapes: vec![shape],
                    variety: Some(form),
                    style,
                    ..any
                }
            }
            Self::Style => styled_wish(Style::ALL[class]),
            Self::Place => {
                let radius = (12.0, 12.0 + 4.0 * stream.uniform());
                Wish {
                    place: Some(Place::ALL[class]),
                    radius,
                    ..any
                }
            }
            Self::Styled(style) => Wish {
                shapes: vec![Shape::ALL[class]],
                style,
                ..any
            },
            Self::Small => Wish {
                shapes: vec![Shape::ALL[class]],
                radius: (6.0, 9.0),
                ..any
            },
            Self::Mixed => Wish {
                layout: if class == 0 {
                    Layout::Single
                } else {
                    Layout::Multi
                },
                count: 1 + class,
                ..any
            },
        }
    }
}

/// A picture whose style can be told: a coloured object that a quarter turn changes.
fn styled_wish(style: Style) -> Wish {
    let colorful = |c: &Color| !matches!(c, Color::Black | Color::Grey);
    Wish {
        shapes: Shape::ALL.into_iter().filter(|s| s.is_upright()).collect(),
        colors: Color::ALL.into_iter().filter(colorful).collect(),
        style,
        ..Wish::default()
    }
}

/// Colour and shape of each class of [`Task::ColorShape`].
fn pairs() -> impl Iterator<Item = (Color, Shape)> {
    PAIR_COLORS
        .into_iter()
        .flat_map(|color| PAIR_SHAPES.map(|shape| (color, shape)))
}

/// Shape and form of each class of [`Task::Variety`].
fn varieties() -> impl Iterator<Item = (Shape, usize)> {
    Shape::ALL
        .into_iter()
        .flat_map(|shape| (0..shape.varieties().len()).map(move |form| (shape, form)))
}
