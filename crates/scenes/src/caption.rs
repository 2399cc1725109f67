//! Sentences about scenes.

use std::collections::BTreeSet;

use crate::stream::{Purpose, Stream};
use crate::task::NUMBERS;
use crate::{Coarse, Color, Kind, Layout, Object, Pattern, Scene, Shape, Style, Task, Texture};

/// How captions are worded: shares from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Wording {
    /// Captions that open with "a photo of" or the like.
    pub opening: f32,
    /// Objects whose colour is said.
    pub color: f32,
    /// Patterned objects whose pattern is said.
    pub pattern: f32,
    /// Plain objects that are called plain.
    pub plain: f32,
    /// Objects called by their kind, by a still broader word or just "object".
    pub vague: f32,
    /// Objects called by the name of their variety, where they have one.
    pub variety: f32,
    /// Rare words in place of usual ones for shapes, colours and patterns.
    pub rare: f32,
    /// Objects whose size is said, if it is a clear case.
    pub size: f32,
    /// Single objects described further ("with a roof and a door").
    pub tail: f32,
    /// Pairs of objects of which one is said to be above the other, if it is.
    pub relation: f32,
    /// Captions that name the colour of the ground.
    pub ground: f32,
    /// Captions that name the texture of the ground, if it has one.
    pub texture: f32,
    /// Styled pictures whose caption says so.
    pub style: f32,
    /// Wrong words for shape, colour, pattern and number.
    pub wrong: f32,
    /// Captions of several objects that leave some out or say "some" for the number.
    pub loose: f32,
}

impl Wording {
    /// The language of the world.
    pub fn full() -> Self {
        Self {
            opening: 0.72,
            color: 0.4,
            pattern: 0.35,
            plain: 0.12,
            vague: 0.22,
            variety: 0.03,
            rare: 0.15,
            size: 0.3,
            tail: 0.04,
            relation: 0.35,
            ground: 0.04,
            texture: 0.015,
            style: 0.25,
            wrong: 0.05,
            loose: 0.4,
        }
    }

    /// The shape's word, sometimes colour and pattern, and nothing wrong.
    pub fn simple() -> Self {
        Self {
            opening: 0.5,
            color: 0.3,
            pattern: 0.2,
            plain: 0.0,
            vague: 0.0,
            variety: 0.0,
            rare: 0.0,
            size: 0.0,
            tail: 0.0,
            relation: 0.0,
            ground: 0.0,
            texture: 0.0,
            style: 0.0,
            wrong: 0.0,
            loose: 0.0,
        }
    }
}

/// Openings and how often each is used.
const OPENINGS: [(&str, f32); 14] = [
    ("a photo of", 22.0),
    ("a picture of", 10.0),
    ("an image of", 7.0),
    ("a drawing of", 4.0),
    ("there is", 5.0),
    ("this is", 4.0),
    ("here is", 2.0),
    ("a close photo of", 3.0),
    ("a cropped photo of", 3.0),
    ("a bad photo of", 3.0),
    ("a good photo of", 3.0),
    ("a bright photo of", 2.0),
    ("look at", 2.0),
    ("i like", 2.0),
];
/// Words for several objects whose number is not said.
const SOME: [&str; 3] = ["some", "several", "many"];
const LARGE: [&str; 2] = ["large", "big"];
const SMALL: [&str; 2] = ["small", "little"];
const GENERIC: [&str; 3] = ["shape", "object", "thing"];
const GLUE: [&str; 14] = [
    "a",
    "an",
    "and",
    ",",
    ".",
    "on",
    "background",
    "pale",
    "above",
    "below",
    "beside",
    "shapes",
    "objects",
    "things",
];

/// A caption of `scene`; captions with other indices are other wordings.
pub fn caption(scene: &Scene, wording: &Wording, seed: u64, index: u64) -> String {
    let stream = Stream::new(Purpose::Caption, seed, [index, 0]);
    Writer {
        scene,
        wording,
        stream,
    }
    .sentence()
}

struct Writer<'a> {
    scene: &'a Scene,
    wording: &'a Wording,
    stream: Stream,
}

impl Writer<'_> {
    fn sentence(&mut self) -> String {
        let parts = [self.opening(), self.content(), self.background()];
        let mut sentence = parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(" ");
        if self.stream.chance(0.4) {
            sentence.push('.');
        }
        sentence
    }

    fn opening(&mut self) -> String {
        let style = self.scene.style;
        if style != Style::Plain && self.stream.chance(self.wording.style) {
            return self.stream.pick(style_openings(style)).to_owned();
        }
        if !self.stream.chance(self.wording.opening) {
            return String::new();
        }
        let chosen = self.stream.weighted(OPENINGS.iter().map(|o| o.1));
        OPENINGS[chosen].0.to_owned()
    }

    fn content(&mut self) -> String {
        let objects = &self.scene.objects;
        match (self.scene.layout, objects.len()) {
            (Layout::Multi, 2..) => self.different(),
            (_, 0) => String::new(),
            (_, 1) => self.one(&objects[0]),
            (_, count) => self.equal(&objects[0], count),
        }
    }

    /// One object with its article and perhaps a description.
    fn one(&mut self, object: &Object) -> String {
        let named = with_article(&self.named(object, false));
        if !self.stream.chance(self.wording.tail) {
            return named;
        }
        format!("{named} {}", self.stream.pick(tails(object)))
    }

    fn equal(&mut self, object: &Object, count: usize) -> String {
        let objects = self.named(object, true);
        let number = if self.stream.chance(self.wording.loose * 0.6) {
            self.stream.pick(&SOME)
        } else if self.stream.chance(self.wording.wrong) {
            self.stream.pick(&NUMBERS[1..])
        } else {
            NUMBERS[(count - 1).min(NUMBERS.len() - 1)]
        };
        format!("{number} {objects}")
    }

    fn different(&mut self) -> String {
        let scene = self.scene;
        let all: Vec<&Object> = scene.objects.iter().collect();
        let said = if self.stream.chance(self.wording.loose) {
            1 + self.stream.below(all.len() - 1)
        } else {
            all.len()
        };
        let chosen = self.stream.some(&all, said);
        let named: Vec<String> = chosen
            .iter()
            .map(|object| with_article(&self.named(object, false)))
            .collect();
        match (named.as_slice(), chosen.as_slice()) {
            ([first, second], [a, b]) if self.stream.chance(self.wording.relation) => {
                format!("{first} {} {second}", relation(a, b))
            }
            ([others @ .., last], [_, _, ..]) => format!("{} and {last}", others.join(", ")),
            _ => named.concat(),
        }
    }

    /// The object's words without an article.
    fn named(&mut self, object: &Object, plural: bool) -> String {
        let mut adjectives = Vec::new();
        let (pattern, tail) = self.pattern(object);
        adjectives.extend(pattern);
        adjectives.extend(self.color(object));
        if adjectives.len() == 2 && self.stream.chance(0.4) {
            adjectives.swap(0, 1);
        }
        let noun = self.noun(object);
        let noun = if plural {
            plural_of(noun)
        } else {
            noun.to_owned()
        };
        let words = self
            .size(object)
            .into_iter()
            .chain(adjectives)
            .map(str::to_owned);
        let words: Vec<String> = words.chain([noun]).chain(tail.map(str::to_owned)).collect();
        words.join(" ")
    }

    fn noun(&mut self, object: &Object) -> &'static str {
        let wrong = self.stream.chance(self.wording.wrong);
        let shape = if wrong {
            self.stream.pick(&Shape::ALL)
        } else {
            object.shape
        };
        if let Some(variety) = object
            .variety_word()
            .filter(|_| self.stream.chance(self.wording.variety))
        {
            return variety;
        }
        if self.stream.chance(self.wording.vague) {
            return match self.stream.weighted([10.0, 3.0, 9.0].into_iter()) {
                0 => shape.kind().word(),
                1 => shape.kind().coarse().word(),
                _ => self.stream.pick(&GENERIC),
            };
        }
        if self.stream.chance(self.wording.rare) && !shape.synonyms().is_empty() {
            return self.stream.pick(shape.synonyms());
        }
        shape.word()
    }

    fn color(&mut self, object: &Object) -> Option<&'static str> {
        if !self.stream.chance(self.wording.color) || !self.scene.style.keeps_color() {
            return None;
        }
        let wrong = self.stream.chance(self.wording.wrong);
        let color = if wrong {
            self.stream.pick(&Color::ALL)
        } else {
            object.color
        };
        Some(if self.stream.chance(self.wording.rare) {
            rare_color(color)
        } else {
            color.word()
        })
    }

    /// An adjective or a phrase behind the noun.
    fn pattern(&mut self, object: &Object) -> (Option<&'static str>, Option<&'static str>) {
        let share = if object.pattern == Pattern::Plain {
            self.wording.plain
        } else {
            self.wording.pattern
        };
        if !self.stream.chance(share) || !self.scene.style.keeps_pattern() {
            return (None, None);
        }
        let wrong = self.stream.chance(self.wording.wrong);
        let pattern = if wrong {
            self.stream.pick(&Pattern::ALL)
        } else {
            object.pattern
        };
        if self.stream.chance(self.wording.rare) {
            return (Some(rare_pattern(pattern)), None);
        }
        match pattern_phrase(pattern) {
            Some(phrase) if self.stream.chance(self.wording.rare) => (None, Some(phrase)),
            _ => (Some(pattern.word()), None),
        }
    }

    fn size(&mut self, object: &Object) -> Option<&'static str> {
        let words = match object.radius {
            r if r > 23.0 => &LARGE,
            r if r < 17.0 => &SMALL,
            _ => return None,
        };
        self.stream
            .chance(self.wording.size)
            .then(|| self.stream.pick(words))
    }

    fn background(&mut self) -> String {
        let Scene {
            style,
            texture,
            ground,
            ..
        } = *self.scene;
        let color = self.stream.chance(self.wording.ground) && style.keeps_color();
        let textured = self.stream.chance(self.wording.texture) && style.keeps_pattern();
        let mut words = Vec::new();
        if textured {
            words.push(texture.word());
        }
        if color {
            let pale = self.scene.pale && self.stream.chance(0.5);
            words.extend(pale.then_some("pale"));
            words.push(ground.word());
        }
        if words.is_empty() {
            return String::new();
        }
        words.push("background");
        format!("on {}", with_article(&words.join(" ")))
    }
}

/// How `a` lies to `b`; left and right are not told, so that mirrored pictures keep their captions.
fn relation(a: &Object, b: &Object) -> &'static str {
    let (dx, dy) = (a.center.0 - b.center.0, a.center.1 - b.center.1);
    match () {
        () if dy.abs() <= dx.abs() => "beside",
        () if dy < 0.0 => "above",
        () => "below",
    }
}

/// "a" or "an" and the words.
fn with_article(words: &str) -> String {
    let article = if words.starts_with(['a', 'e', 'i', 'o', 'u']) {
        "an"
    } else {
        "a"
    };
    format!("{article} {words}")
}

/// The plural of a noun or of a phrase that ends in one.
fn plural_of(noun: &str) -> String {
    match noun {
        "fish" | "trout" => noun.to_owned(),
        "leaf" => "leaves".to_owned(),
        "fungus" => "fungi".to_owned(),
        _ if noun.ends_with(['s', 'x']) || noun.ends_with("ch") || noun.ends_with("sh") => {
            format!("{noun}es")
        }
        _ if noun.ends_with("ey") => format!("{noun}s"),
        _ => match noun.strip_suffix('y') {
            Some(stem) => format!("{stem}ies"),
            None => format!("{noun}s"),
        },
    }
}

fn style_openings(style: Style) -> &'static [&'static str] {
    match style {
        Style::Plain => &[],
        Style::Sketch => &["a sketch of", "a line drawing of", "a sketch picture of"],
        Style::Noise => &[
            "a noisy photo of",
            "a noisy picture of",
            "a speckled photo of",
        ],
        Style::Blur => &[
            "a blurry photo of",
            "a blurry picture of",
            "an unsharp photo of",
        ],
        Style::Inverted => &[
            "an inverted photo of",
            "an inverted picture of",
            "a negative of",
        ],
        Style::Rotated => &[
            "a rotated photo of",
            "a rotated picture of",
            "a turned photo of",
        ],
        Style::Grey => &[
            "a greyscale photo of",
            "a greyscale picture of",
            "a colourless photo of",
        ],
    }
}

fn rare_color(color: Color) -> &'static str {
    match color {
        Color::Red => "scarlet",
        Color::Orange => "amber",
        Color::Yellow => "lemon",
        Color::Green => "emerald",
        Color::Blue => "navy",
        Color::Purple => "violet",
        Color::Pink => "rose",
        Color::Brown => "chocolate",
        Color::Black => "ebony",
        Color::Grey => "silver",
    }
}

fn rare_pattern(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Plain => "solid",
        Pattern::Striped => "banded",
        Pattern::Dotted => "spotted",
        Pattern::Checkered => "checked",
        Pattern::Wavy => "rippled",
        Pattern::Plaid => "tartan",
        Pattern::Shaded => "faded",
        Pattern::Marbled => "mottled",
    }
}

fn pattern_phrase(pattern: Pattern) -> Option<&'static str> {
    match pattern {
        Pattern::Plain => None,
        Pattern::Striped => Some("with stripes"),
        Pattern::Dotted => Some("with dots"),
        Pattern::Checkered => Some("with checks"),
        Pattern::Wavy => Some("with waves"),
        Pattern::Plaid => Some("with crossing bands"),
        Pattern::Shaded => Some("with shading"),
        Pattern::Marbled => Some("with veins"),
    }
}

/// Descriptions of an object's shape, the first of the shape and then of its variety.
fn tails(object: &Object) -> &'static [&'static str] {
    shape_tails(object.shape, object.variety)
}

fn shape_tails(shape: Shape, variety: usize) -> &'static [&'static str] {
    match (shape, variety) {
        (Shape::Circle, _) => &["with a round outline"],
        (Shape::Oval, _) => &["like a flat circle"],
        (Shape::Ring, _) => &["with a round hole"],
        (Shape::Triangle, _) => &["with three corners"],
        (Shape::Square, _) => &["with four equal sides"],
        (Shape::Diamond, _) => &["with four sides and sharp ends"],
        (Shape::Hexagon, _) => &["with six sides"],
        (Shape::Arrow, _) => &["with a long shaft and a sharp head"],
        (Shape::Bolt, _) => &["with a zigzag"],
        (Shape::Flag, _) => &["on a pole"],
        (Shape::Cross, _) => &["with four equal arms"],
        (Shape::Star, 0) => &["with sharp points", "with four points"],
        (Shape::Star, 1) => &["with sharp points", "with five points"],
        (Shape::Star, _) => &["with sharp points", "with six points"],
        (Shape::Heart, _) => &["with two round lobes"],
        (Shape::Tree, _) => &["with a trunk"],
        (Shape::Leaf, 0) => &["with a stem", "with round lobes"],
        (Shape::Leaf, 1) => &["with a stem", "with a narrow blade"],
        (Shape::Leaf, _) => &["with a stem", "like a fan"],
        (Shape::Flower, 0) => &["with petals", "with many thin petals"],
        (Shape::Flower, 1) => &["with petals", "with five broad petals"],
        (Shape::Flower, _) => &["with petals", "with a long stem and two leaves"],
        (Shape::Mushroom, 0) => &["with a cap", "with a tall cap full of holes"],
        (Shape::Mushroom, 1) => &["with a cap", "with a broad cap"],
        (Shape::Mushroom, _) => &["with a cap", "with three thin stems"],
        (Shape::Fish, 0) => &["with a tail", "with short fins"],
        (Shape::Fish, 1) => &["with a tail", "with a long sharp nose"],
        (Shape::Fish, _) => &["with a tail", "with a round body and spikes"],
        (Shape::Bird, 0) => &["with a beak", "with a round body and a raised tail"],
        (Shape::Bird, 1) => &["with a beak", "with long legs and a long neck"],
        (Shape::Bird, _) => &["with a beak", "with spread wings"],
        (Shape::Butterfly, _) => &["with four wings"],
        (Shape::Cat, _) => &["with two pointed ears"],
        (Shape::Sun, _) => &["with many rays"],
        (Shape::Moon, _) => &["with two sharp ends"],
        (Shape::Cloud, _) => &["with a flat base"],
        (Shape::Drop, _) => &["with a sharp tip"],
        (Shape::Boat, 0) => &["with a hull", "with one sail"],
        (Shape::Boat, 1) => &["with a hull", "with two masts"],
        (Shape::Boat, _) => &["with a hull", "with a cabin and a funnel"],
        (Shape::Car, _) => &["with two wheels"],
        (Shape::Rocket, _) => &["with fins and a flame"],
        (Shape::Hammer, _) => &["with a long handle"],
        (Shape::Key, _) => &["with teeth"],
        (Shape::Umbrella, _) => &["with a hooked handle"],
        (Shape::Bell, _) => &["with a wide rim"],
        (Shape::Cup, _) => &["with a handle"],
        (Shape::House, 0) => &["with a roof and a door", "with a wide low roof"],
        (Shape::House, 1) => &["with a roof and a door", "with a large sloping roof"],
        (Shape::House, _) => &["with a roof and a door", "with a tall narrow front"],
        (Shape::Castle, _) => &["with two towers"],
        (Shape::Tent, _) => &["with an open flap"],
    }
}

/// Every word and punctuation mark that captions, class names and templates can contain, sorted.
pub fn vocabulary() -> Vec<String> {
    let mut phrases: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| phrases.extend(words.iter().map(|w| (*w).to_owned()));
    for list in [&NUMBERS[..], &SOME, &LARGE, &SMALL, &GENERIC, &GLUE] {
        add(list);
    }
    add(&OPENINGS.map(|o| o.0));
    add(&Texture::ALL.map(Texture::word));
    add(&Color::ALL.map(Color::word));
    add(&Color::ALL.map(rare_color));
    add(&Pattern::ALL.map(Pattern::word));
    add(&Pattern::ALL.map(rare_pattern));
    Pattern::ALL
        .into_iter()
        .filter_map(pattern_phrase)
        .for_each(|phrase| add(&[phrase]));
    Style::ALL
        .into_iter()
        .for_each(|style| add(style_openings(style)));
    for shape in Shape::ALL {
        (0..shape.forms()).for_each(|form| add(shape_tails(shape, form)));
    }
    phrases.extend(nouns().flat_map(|noun| [noun.to_owned(), plural_of(noun)]));
    for task in Task::ALL {
        phrases.push(task.template().replace("{}", ""));
        phrases.extend(task.classes());
    }
    let words: BTreeSet<String> = phrases.iter().flat_map(|phrase| words_of(phrase)).collect();
    words.into_iter().collect()
}

/// All words for objects that may have a plural.
fn nouns() -> impl Iterator<Item = &'static str> {
    let shapes = Shape::ALL.into_iter();
    let named = shapes.flat_map(|s| {
        [s.word()]
            .into_iter()
            .chain(s.synonyms().iter().copied())
            .chain(s.varieties().iter().copied())
    });
    named
        .chain(Kind::ALL.map(Kind::word))
        .chain(Coarse::ALL.map(Coarse::word))
}

/// Splits a sentence into words and punctuation marks.
fn words_of(sentence: &str) -> Vec<String> {
    sentence
        .replace(',', " , ")
        .replace('.', " . ")
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}
