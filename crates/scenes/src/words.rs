//! What a picture can show, and the words for it.

/// An enum whose values are listed in `ALL` and have one usual word each.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $count:literal: $($(#[$item_doc:meta])* $item:ident = $word:literal),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the word of each value is its documentation")]
        pub enum $name { $($(#[$item_doc])* $item),+ }

        impl $name {
            /// All values, in the order of [`index`](Self::index).
            pub const ALL: [Self; $count] = [$(Self::$item),+];

            /// The usual word, lower case.
            pub fn word(self) -> &'static str {
                match self { $(Self::$item => $word),+ }
            }

            /// The place in [`ALL`](Self::ALL).
            pub fn index(self) -> usize {
                self as usize
            }
        }
    };
}

words! {
    /// The broadest level of the taxonomy of shapes.
    Coarse, 4:
    Figure = "figure", Sign = "sign", Nature = "natural object", Made = "manmade object",
}

words! {
    /// The middle level of the taxonomy of shapes.
    Kind, 10:
    Round = "round shape", Polygon = "polygon", Pointer = "pointer", Mark = "mark", Plant = "plant", Animal = "animal",
    Weather = "weather symbol", Vehicle = "vehicle", Tool = "tool", Building = "building",
}

words! {
    /// What an object is.
    Shape, 36:
    Circle = "circle", Oval = "oval", Ring = "ring", Triangle = "triangle", Square = "square", Diamond = "diamond",
    Hexagon = "hexagon", Arrow = "arrow", Bolt = "bolt", Flag = "flag", Cross = "cross", Star = "star", Heart = "heart",
    Tree = "tree", Leaf = "leaf", Flower = "flower", Mushroom = "mushroom", Fish = "fish", Bird = "bird",
    Butterfly = "butterfly", Cat = "cat", Sun = "sun", Moon = "moon", Cloud = "cloud", Drop = "drop", Boat = "boat",
    Car = "car", Rocket = "rocket", Hammer = "hammer", Key = "key", Umbrella = "umbrella", Bell = "bell", Cup = "cup",
    House = "house", Castle = "castle", Tent = "tent",
}

words! {
    /// The colour of an object or of the ground.
    Color, 10:
    Red = "red", Orange = "orange", Yellow = "yellow", Green = "green", Blue = "blue", Purple = "purple", Pink = "pink",
    Brown = "brown", Black = "black", Grey = "grey",
}

words! {
    /// What covers an object.
    Pattern, 8:
    Plain = "plain", Striped = "striped", Dotted = "dotted", Checkered = "checkered", Wavy = "wavy", Plaid = "plaid",
    Shaded = "shaded", Marbled = "marbled",
}

words! {
    /// What the ground looks like.
    Texture, 6:
    Plain = "plain", Gradient = "gradient", Cloudy = "cloudy", Grainy = "grainy", Lined = "lined", Tiled = "tiled",
}

words! {
    /// How the whole picture is rendered.
    Style, 7:
    Plain = "plain",
    /// Dark outlines on paper.
    Sketch = "sketch",
    /// Strong pixel noise.
    Noise = "noisy",
    Blur = "blurry",
    /// The negative.
    Inverted = "inverted",
    /// The objects are turned by 90, 180 or 270 degrees.
    Rotated = "rotated",
    /// Without colours.
    Grey = "greyscale",
}

words! {
    /// Where a single object is.
    Place, 5:
    Left = "left", Right = "right", Top = "top", Bottom = "bottom", Centre = "centre",
}

impl Kind {
    /// The group this kind belongs to.
    pub fn coarse(self) -> Coarse {
        match self {
            Self::Round | Self::Polygon => Coarse::Figure,
            Self::Pointer | Self::Mark => Coarse::Sign,
            Self::Plant | Self::Animal | Self::Weather => Coarse::Nature,
            Self::Vehicle | Self::Tool | Self::Building => Coarse::Made,
        }
    }

    /// The shapes of this kind, in the order of [`Shape::ALL`].
    pub fn shapes(self) -> Vec<Shape> {
        Shape::ALL
            .into_iter()
            .filter(|s| s.kind() == self)
            .collect()
    }
}

impl Shape {
    /// The group this shape belongs to.
    pub fn kind(self) -> Kind {
        match self {
            Self::Circle | Self::Oval | Self::Ring => Kind::Round,
            Self::Triangle | Self::Square | Self::Diamond | Self::Hexagon => Kind::Polygon,
            Self::Arrow | Self::Bolt | Self::Flag => Kind::Pointer,
            Self::Cross | Self::Star | Self::Heart => Kind::Mark,
            Self::Tree | Self::Leaf | Self::Flower | Self::Mushroom => Kind::Plant,
            Self::Fish | Self::Bird | Self::Butterfly | Self::Cat => Kind::Animal,
            Self::Sun | Self::Moon | Self::Cloud | Self::Drop => Kind::Weather,
            Self::Boat | Self::Car | Self::Rocket => Kind::Vehicle,
            Self::Hammer | Self::Key | Self::Umbrella | Self::Bell | Self::Cup => Kind::Tool,
            Self::House | Self::Castle | Self::Tent => Kind::Building,
        }
    }

    /// The names of the shape's varieties; empty if it has one form only.
    pub fn varieties(self) -> &'static [&'static str] {
        match self {
            Self::Star => &["astroid", "pentagram", "hexagram"],
            Self::Leaf => &["oak", "willow", "ginkgo"],
            Self::Flower => &["aster", "pansy", "tulip"],
            Self::Mushroom => &["morel", "bolete", "enoki"],
            Self::Fish => &["perch", "marlin", "puffer"],
            Self::Bird => &["wren", "heron", "kestrel"],
            Self::Boat => &["dinghy", "yawl", "trawler"],
            Self::House => &["bungalow", "chalet", "townhouse"],
            _ => &[],
        }
    }

    /// In how many forms the shape is drawn, at least 1.
    pub fn forms(self) -> usize {
        self.varieties().len().max(1)
    }

    /// Rarer words for the shape, most of them with exactly one.
    pub fn synonyms(self) -> &'static [&'static str] {
        match self {
            Self::Circle => &["disc"],
            Self::Oval => &["ellipse"],
            Self::Ring => &["hoop"],
            Self::Diamond => &["rhombus"],
            Self::Arrow => &["dart"],
            Self::Bolt => &["thunderbolt"],
            Self::Flag => &["banner"],
            Self::Tree => &["pine"],
            Self::Flower => &["blossom"],
            Self::Mushroom => &["fungus"],
            Self::Fish => &["trout"],
            Self::Bird => &["sparrow"],
            Self::Butterfly => &["moth"],
            Self::Cat => &["kitten"],
            Self::Moon => &["crescent"],
            Self::Cloud => &["puff"],
            Self::Drop => &["raindrop"],
            Self::Boat => &["ship"],
            Self::Car => &["automobile"],
            Self::Rocket => &["missile"],
            Self::Hammer => &["mallet"],
            Self::Umbrella => &["parasol"],
            Self::Bell => &["chime"],
            Self::Cup => &["mug"],
            Self::House => &["cottage"],
            Self::Castle => &["fortress"],
            Self::Tent => &["teepee"],
            Self::Triangle
            | Self::Square
            | Self::Hexagon
            | Self::Cross
            | Self::Star
            | Self::Heart
            | Self::Leaf
            | Self::Sun
            | Self::Key => &[],
        }
    }

    /// Whether turning the shape by a quarter changes what is seen.
    pub fn is_upright(self) -> bool {
        !matches!(
            self,
            Self::Circle
                | Self::Ring
                | Self::Square
                | Self::Hexagon
                | Self::Cross
                | Self::Star
                | Self::Flower
                | Self::Sun
        )
    }
}

impl Style {
    /// Whether the named colours can be seen.
    pub fn keeps_color(self) -> bool {
        !matches!(self, Self::Sketch | Self::Inverted | Self::Grey)
    }

    /// Whether patterns and textures can be seen.
    pub fn keeps_pattern(self) -> bool {
        !matches!(self, Self::Sketch)
    }
}
