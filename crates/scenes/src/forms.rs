//! The outlines of all shapes and their varieties.

use std::sync::LazyLock;

use crate::Shape;
use crate::outline::{
    Contour, Mask, Outline, arc, burst, direction, disc, line, petal, poly, rect, smooth,
};

/// Masks of all forms of all shapes, drawn once.
static MASKS: LazyLock<Vec<Vec<Mask>>> = LazyLock::new(|| {
    let masks = |shape: Shape| (0..shape.forms()).map(move |form| outline(shape, form).mask());
    Shape::ALL
        .into_iter()
        .map(|shape| masks(shape).collect())
        .collect()
});

/// The mask of a shape in one of its forms.
pub(crate) fn mask(shape: Shape, form: usize) -> &'static Mask {
    &MASKS[shape.index()][form]
}

fn outline(shape: Shape, form: usize) -> Outline {
    let new = Outline::default();
    match shape {
        Shape::Circle => new.add(disc(0.0, 0.0, 1.0, 1.0)),
        Shape::Oval => new.add(disc(0.0, 0.0, 1.0, 0.6)),
        Shape::Ring => new
            .add(disc(0.0, 0.0, 1.0, 1.0))
            .cut(disc(0.0, 0.0, 0.58, 0.58)),
        Shape::Triangle => new.add(poly(&[(0.0, -1.0), (1.0, 0.75), (-1.0, 0.75)])),
        Shape::Square => new.add(rect(-1.0, -1.0, 1.0, 1.0)),
        Shape::Diamond => new.add(poly(&[(0.0, -1.0), (0.62, 0.0), (0.0, 1.0), (-0.62, 0.0)])),
        Shape::Hexagon => new.add((0..6).map(|i| direction(i as f32 / 6.0)).collect()),
        Shape::Arrow => arrow(),
        Shape::Bolt => bolt(),
        Shape::Flag => flag(),
        Shape::Cross => new
            .add(rect(-0.3, -1.0, 0.3, 1.0))
            .add(rect(-1.0, -0.3, 1.0, 0.3)),
        Shape::Star => new.add(star(form)),
        Shape::Heart => new.add(heart()),
        Shape::Tree => tree(),
        Shape::Leaf => [oak, willow, ginkgo][form](),
        Shape::Flower => [aster, pansy, tulip][form](),
        Shape::Mushroom => [morel, bolete, enoki][form](),
        Shape::Fish => [perch, marlin, puffer][form](),
        Shape::Bird => [wren, heron, kestrel][form](),
        Shape::Butterfly => butterfly(),
        Shape::Cat => cat(),
        Shape::Sun => sun(),
        Shape::Moon => new
            .add(disc(0.0, 0.0, 1.0, 1.0))
            .cut(disc(0.5, -0.15, 0.85, 0.85))
            .turn(-0.2),
        Shape::Cloud => cloud(),
        Shape::Drop => drop(),
        Shape::Boat => [dinghy, yawl, trawler][form](),
        Shape::Car => car(),
        Shape::Rocket => rocket(),
        Shape::Hammer => hammer(),
        Shape::Key => key(),
        Shape::Umbrella => umbrella(),
        Shape::Bell => bell(),
        Shape::Cup => cup(),
        Shape::House => [bungalow, chalet, townhouse][form](),
        Shape::Castle => castle(),
        Shape::Tent => tent(),
    }
}

/// A row of equal polygons.
fn row(xs: &[f32], make: impl Fn(f32) -> Contour) -> Vec<Contour> {
    xs.iter().map(|&x| make(x)).collect()
}

/// The same polygon on the left and on the right.
fn both(contour: Contour) -> Vec<Contour> {
    let mirrored = contour.iter().map(|&(x, y)| (-x, y)).collect();
    vec![contour, mirrored]
}

fn arrow() -> Outline {
    let points = [
        (-1.0, -0.22),
        (0.1, -0.22),
        (0.1, -0.66),
        (1.0, 0.0),
        (0.1, 0.66),
        (0.1, 0.22),
        (-1.0, 0.22),
    ];
    Outline::default().add(poly(&points))
}

fn bolt() -> Outline {
    let points = [
        (-0.15, -1.0),
        (0.45, -1.0),
        (0.15, -0.32),
        (0.62, -0.32),
        (-0.35, 1.0),
        (-0.02, 0.1),
        (-0.52, 0.1),
    ];
    Outline::default().add(poly(&points))
}

fn flag() -> Outline {
    Outline::default()
        .add(rect(-0.82, -1.0, -0.62, 1.0))
        .add(poly(&[
            (-0.62, -0.96),
            (0.9, -0.96),
            (0.5, -0.44),
            (0.9, 0.08),
            (-0.62, 0.08),
        ]))
}

/// Four, five or six tips.
fn star(form: usize) -> Contour {
    let inner = [0.3, 0.42, 0.577][form];
    burst(4 + form, inner)
}

fn heart() -> Contour {
    (0..64)
        .map(|i| {
            let t = i as f32 / 64.0;
            let (c, s) = direction(t);
            let [c2, c3, c4] = [2.0, 3.0, 4.0].map(|k| direction(k * t).0);
            (16.0 * s * s * s, -(13.0 * c - 5.0 * c2 - 2.0 * c3 - c4))
        })
        .collect()
}

fn tree() -> Outline {
    let tier =
        |top: f32, bottom: f32, half: f32| poly(&[(0.0, top), (half, bottom), (-half, bottom)]);
    Outline::default()
        .add(tier(-1.0, -0.38, 0.45))
        .add(tier(-0.72, 0.12, 0.62))
        .add(tier(-0.3, 0.62, 0.8))
        .add(rect(-0.15, 0.6, 0.15, 1.0))
}

/// Deep round lobes on both sides.
fn oak() -> Outline {
    Outline::default()
        .add(petal((0.0, -0.95), (0.0, 0.75), 0.62))
        .add_all(both(petal((0.05, -0.35), (0.52, -0.72), 0.34)))
        .add_all(both(petal((0.05, 0.05), (0.68, -0.25), 0.36)))
        .add_all(both(petal((0.05, 0.45), (0.6, 0.28), 0.34)))
        .add_all(line(&[(0.0, 0.7), (0.0, 1.1)], 0.13))
        .cut_all(line(&[(0.0, -0.6), (0.0, 0.62)], 0.07))
        .turn(0.35)
}

/// A narrow blade.
fn willow() -> Outline {
    let side = |sign: f32| {
        (0..=16)
            .map(move |i| i as f32 / 8.0 - 1.0)
            .map(move |t| (sign * 0.27 * (1.0 - t * t), sign * t))
    };
    Outline::default()
        .add(side(1.0).chain(side(-1.0)).collect())
        .add_all(line(&[(0.0, 0.9), (0.06, 1.3)], 0.1))
        .cut_all(line(&[(0.0, -0.6), (0.0, 0.8)], 0.06))
        .turn(0.6)
}

/// A fan with a notch.
fn ginkgo() -> Outline {
    let mut fan = arc(0.0, 0.55, 1.2, 1.3, 0.6, 0.9);
    fan.push((0.0, 0.6));
    Outline::default()
        .add(fan)
        .cut(poly(&[(-0.2, -0.9), (0.2, -0.9), (0.0, 0.05)]))
        .cut_all(both(poly(&[(0.46, -0.8), (0.66, -0.66), (0.42, -0.4)])))
        .add_all(line(&[(0.0, 0.45), (0.02, 0.8), (0.14, 1.1)], 0.12))
}

/// Many thin petals.
fn aster() -> Outline {
    let petals = (0..11).map(|i| {
        let (x, y) = direction(i as f32 / 11.0 - 0.25);
        petal((0.3 * x, 0.3 * y), (x, y), 0.27)
    });
    Outline::default()
        .add_all(petals)
        .add(disc(0.0, 0.0, 0.36, 0.36))
        .cut(disc(0.0, 0.0, 0.2, 0.2))
}

/// Five broad petals.
fn pansy() -> Outline {
    let petals = (0..5).map(|i| {
        let (x, y) = direction(i as f32 / 5.0 - 0.25);
        disc(0.58 * x, 0.58 * y, 0.42, 0.42)
    });
    Outline::default()
        .add_all(petals)
        .add(disc(0.0, 0.0, 0.4, 0.4))
        .cut(disc(0.0, 0.0, 0.2, 0.2))
}

/// A cup on a stem with two leaves.
fn tulip() -> Outline {
    let half = [
        (0.5, -1.0),
        (0.24, -0.62),
        (0.0, -1.05),
        (-0.24, -0.62),
        (-0.5, -1.0),
        (-0.56, -0.4),
    ];
    let bottom = [(-0.34, -0.04), (0.34, -0.04), (0.56, -0.4)];
    Outline::default()
        .add(half.into_iter().chain(bottom).collect())
        .add_all(line(&[(0.0, -0.1), (0.0, 1.0)], 0.14))
        .add_all(both(petal((0.02, 0.95), (0.6, 0.15), 0.26)))
}

/// A tall cap full of pits.
fn morel() -> Outline {
    let pits = [
        (0.0, -0.78),
        (-0.22, -0.45),
        (0.2, -0.5),
        (0.0, -0.16),
        (-0.3, -0.08),
        (0.28, -0.12),
    ];
    Outline::default()
        .add(smooth(&[
            (0.0, -1.1),
            (0.4, -0.65),
            (0.52, 0.0),
            (0.25, 0.26),
            (-0.25, 0.26),
            (-0.52, 0.0),
            (-0.4, -0.65),
        ]))
        .cut_all(pits.map(|(x, y)| disc(x, y, 0.1, 0.12)))
        .add(poly(&[(-0.2, 0.2), (0.2, 0.2), (0.3, 1.0), (-0.3, 1.0)]))
}

/// A broad dome on a stout stem.
fn bolete() -> Outline {
    Outline::default()
        .add(arc(0.0, 0.0, 1.0, 0.85, 0.5, 1.0))
        .add(smooth(&[
            (-0.3, -0.1),
            (0.3, -0.1),
            (0.38, 0.8),
            (0.0, 0.92),
            (-0.38, 0.8),
        ]))
}

/// Three small caps on thin stems.
fn enoki() -> Outline {
    let caps = [(-0.66, -0.32), (0.0, -0.72), (0.66, -0.32)];
    Outline::default()
        .add_all(line(&[(-0.1, 1.0), (-0.4, 0.35), (-0.66, -0.3)], 0.16))
        .add_all(line(&[(0.0, 1.0), (0.0, -0.7)], 0.16))
        .add_all(line(&[(0.1, 1.0), (0.4, 0.35), (0.66, -0.3)], 0.16))
        .add_all(caps.map(|(x, y)| arc(x, y, 0.34, 0.36, 0.5, 1.0)))
}

fn perch() -> Outline {
    Outline::default()
        .add(petal((-1.0, 0.0), (0.62, 0.0), 0.82))
        .add(poly(&[(0.42, 0.0), (1.0, -0.46), (0.84, 0.0), (1.0, 0.46)]))
        .add(poly(&[
            (-0.5, -0.3),
            (-0.25, -0.66),
            (0.3, -0.5),
            (0.35, -0.15),
        ]))
        .add(poly(&[(-0.2, 0.3), (0.1, 0.62), (0.2, 0.25)]))
        .cut(disc(-0.66, -0.1, 0.09, 0.09))
}

/// A spear and a tall sail.
fn marlin() -> Outline {
    Outline::default()
        .add(petal((-0.75, 0.1), (0.75, 0.1), 0.42))
        .add(poly(&[(-1.25, -0.04), (-0.55, -0.02), (-0.55, 0.2)]))
        .add(poly(&[
            (-0.4, 0.05),
            (-0.42, -0.75),
            (-0.1, -0.55),
            (0.45, -0.15),
            (0.5, 0.05),
        ]))
        .add(poly(&[(0.6, 0.1), (1.1, -0.5), (0.86, 0.1), (1.1, 0.65)]))
        .cut(disc(-0.5, 0.06, 0.07, 0.07))
}

/// A ball with spines.
fn puffer() -> Outline {
    let spines = burst(13, 0.8)
        .into_iter()
        .map(|(x, y)| (0.8 * x - 0.1, 0.8 * y));
    Outline::default()
        .add(spines.collect())
        .add(poly(&[(0.55, 0.0), (1.0, -0.34), (0.92, 0.0), (1.0, 0.34)]))
        .cut(disc(-0.42, -0.16, 0.11, 0.11))
}

/// A round body with a cocked tail.
fn wren() -> Outline {
    Outline::default()
        .add(smooth(&[
            (-0.75, -0.3),
            (-0.45, -0.62),
            (-0.1, -0.42),
            (0.35, -0.1),
            (0.5, 0.25),
            (0.1, 0.6),
            (-0.4, 0.5),
            (-0.65, 0.1),
        ]))
        .add(poly(&[(-0.68, -0.46), (-1.05, -0.28), (-0.68, -0.18)]))
        .add(poly(&[
            (0.2, 0.0),
            (0.62, -0.85),
            (0.92, -0.66),
            (0.5, 0.3),
        ]))
        .add_all(line(&[(-0.15, 0.5), (-0.15, 0.98), (-0.35, 0.98)], 0.1))
        .add_all(line(&[(0.12, 0.5), (0.12, 0.98), (-0.05, 0.98)], 0.1))
        .cut(disc(-0.46, -0.34, 0.08, 0.08))
}

/// Long legs, neck and bill.
fn heron() -> Outline {
    Outline::default()
        .add(petal((-0.35, -0.05), (0.75, 0.12), 0.52))
        .add_all(line(
            &[(-0.2, -0.02), (-0.42, -0.3), (-0.2, -0.6), (-0.3, -0.85)],
            0.16,
        ))
        .add(disc(-0.32, -0.88, 0.18, 0.15))
        .add(poly(&[(-0.35, -1.0), (-0.98, -0.76), (-0.35, -0.78)]))
        .add_all(line(&[(0.05, 0.2), (0.05, 1.05), (-0.15, 1.05)], 0.1))
        .add_all(line(
            &[(0.3, 0.2), (0.36, 0.6), (0.26, 1.05), (0.08, 1.05)],
            0.1,
        ))
}

/// In flight, seen from below.
fn kestrel() -> Outline {
    Outline::default()
        .add(petal((0.0, -0.62), (0.0, 0.45), 0.38))
        .add(poly(&[(-0.1, -0.5), (0.0, -0.78), (0.1, -0.5)]))
        .add_all(both(poly(&[
            (0.05, -0.4),
            (0.5, -0.58),
            (1.1, 0.1),
            (0.62, -0.08),
            (0.5, 0.08),
            (0.08, 0.15),
        ])))
        .add(poly(&[
            (-0.1, 0.3),
            (0.1, 0.3),
            (0.3, 0.9),
            (0.0, 0.78),
            (-0.3, 0.9),
        ]))
}

fn butterfly() -> Outline {
    Outline::default()
        .add_all(both(petal((0.05, 0.05), (0.9, -0.75), 0.75)))
        .add_all(both(petal((0.05, 0.0), (0.68, 0.75), 0.58)))
        .add(petal((0.0, -0.55), (0.0, 0.65), 0.2))
        .add_all(both_lines(&[(0.0, -0.45), (0.28, -0.98)], 0.08))
        .cut_all(both(disc(0.6, -0.46, 0.14, 0.14)))
}

/// A line on the left and on the right.
fn both_lines(points: &[(f32, f32)], width: f32) -> Vec<Contour> {
    line(points, width).into_iter().flat_map(both).collect()
}

fn cat() -> Outline {
    Outline::default()
        .add(disc(0.0, 0.15, 0.8, 0.68))
        .add_all(both(poly(&[(0.15, -0.4), (0.7, -1.0), (0.79, 0.1)])))
        .add_all(both_lines(&[(0.6, 0.3), (1.08, 0.2)], 0.07))
        .add_all(both_lines(&[(0.6, 0.45), (1.05, 0.55)], 0.07))
        .cut_all(both(petal((0.34, -0.16), (0.34, 0.14), 0.2)))
        .cut(poly(&[(-0.13, 0.33), (0.13, 0.33), (0.0, 0.5)]))
}

fn sun() -> Outline {
    let rays = (0..10).map(|i| {
        let (x, y) = direction(i as f32 / 10.0);
        let base = |side: f32| (0.66 * x - side * 0.13 * y, 0.66 * y + side * 0.13 * x);
        vec![base(-1.0), (x, y), base(1.0)]
    });
    Outline::default()
        .add(disc(0.0, 0.0, 0.54, 0.54))
        .add_all(rays)
}

fn cloud() -> Outline {
    Outline::default()
        .add(disc(-0.58, 0.15, 0.42, 0.36))
        .add(disc(-0.12, -0.18, 0.5, 0.48))
        .add(disc(0.42, -0.02, 0.42, 0.4))
        .add(disc(0.72, 0.22, 0.32, 0.29))
        .add(rect(-0.58, 0.15, 0.72, 0.51))
}

fn drop() -> Outline {
    let mut contour = arc(0.0, 0.32, 0.66, 0.66, -0.07, 0.57);
    contour.extend([(-0.24, -0.5), (0.0, -1.1), (0.24, -0.5)]);
    Outline::default().add(contour)
}

fn hull(left: f32, right: f32) -> Contour {
    poly(&[
        (left, 0.42),
        (right, 0.42),
        (right - 0.3, 0.92),
        (left + 0.3, 0.92),
    ])
}

/// One sail.
fn dinghy() -> Outline {
    Outline::default()
        .add(hull(-0.85, 0.85))
        .add(rect(-0.1, -1.0, 0.04, 0.45))
        .add(poly(&[(0.1, -0.95), (0.78, 0.28), (0.1, 0.28)]))
}

/// Two masts, the hinder one shorter.
fn yawl() -> Outline {
    Outline::default()
        .add(hull(-1.1, 1.1))
        .add(rect(-0.22, -1.0, -0.1, 0.45))
        .add(poly(&[(-0.28, -0.9), (-0.28, 0.28), (-1.0, 0.28)]))
        .add(poly(&[(-0.04, -0.95), (0.42, 0.28), (-0.04, 0.28)]))
        .add(rect(0.58, -0.4, 0.68, 0.45))
        .add(poly(&[(0.72, -0.35), (1.12, 0.28), (0.72, 0.28)]))
}

/// A deep hull with a high bow, a cabin and a funnel.
fn trawler() -> Outline {
    Outline::default()
        .add(poly(&[
            (-1.0, 0.2),
            (0.4, 0.2),
            (0.62, 0.0),
            (1.1, 0.0),
            (0.72, 0.75),
            (-0.85, 0.75),
        ]))
        .add(rect(-0.5, -0.28, 0.3, 0.25))
        .add(rect(-0.32, -0.8, -0.02, -0.25))
        .cut_all(row(&[-0.28, 0.08], |x| disc(x, -0.03, 0.12, 0.12)))
}

fn car() -> Outline {
    Outline::default()
        .add(smooth(&[
            (-1.0, 0.0),
            (-0.6, -0.1),
            (0.6, -0.1),
            (1.0, 0.02),
            (1.02, 0.4),
            (0.0, 0.42),
            (-1.02, 0.4),
        ]))
        .add(poly(&[
            (-0.72, 0.0),
            (-0.42, -0.55),
            (0.32, -0.55),
            (0.66, 0.0),
        ]))
        .cut(poly(&[
            (-0.5, -0.06),
            (-0.33, -0.42),
            (-0.1, -0.42),
            (-0.1, -0.06),
        ]))
        .cut(poly(&[
            (0.03, -0.42),
            (0.24, -0.42),
            (0.45, -0.06),
            (0.03, -0.06),
        ]))
        .cut_all(row(&[-0.55, 0.55], |x| disc(x, 0.42, 0.31, 0.31)))
        .add_all(row(&[-0.55, 0.55], |x| disc(x, 0.42, 0.24, 0.24)))
}

fn rocket() -> Outline {
    Outline::default()
        .add(smooth(&[
            (0.0, -1.1),
            (0.28, -0.6),
            (0.32, 0.0),
            (0.22, 0.5),
            (-0.22, 0.5),
            (-0.32, 0.0),
            (-0.28, -0.6),
        ]))
        .add_all(both(poly(&[
            (0.25, 0.0),
            (0.66, 0.4),
            (0.66, 0.8),
            (0.2, 0.5),
        ])))
        .cut(disc(0.0, -0.35, 0.15, 0.15))
        .add(poly(&[(-0.15, 0.6), (0.15, 0.6), (0.0, 1.1)]))
}

fn hammer() -> Outline {
    Outline::default()
        .add(rect(-0.13, -0.4, 0.13, 1.1))
        .add(rect(-0.6, -0.75, 0.25, -0.3))
        .add(poly(&[
            (0.25, -0.72),
            (0.5, -0.68),
            (0.8, -0.4),
            (0.25, -0.42),
        ]))
        .turn(0.5)
}

fn key() -> Outline {
    Outline::default()
        .add(disc(-0.58, 0.0, 0.44, 0.44))
        .cut(disc(-0.58, 0.0, 0.21, 0.21))
        .add(rect(-0.2, -0.11, 1.02, 0.11))
        .add(rect(0.5, 0.0, 0.68, 0.4))
        .add(rect(0.84, 0.0, 1.02, 0.4))
        .turn(-0.5)
}

fn umbrella() -> Outline {
    let scallops = row(&[-0.667, 0.0, 0.667], |x| disc(x, 0.02, 0.31, 0.2));
    let hook = arc(-0.2, 0.78, 0.2, 0.2, 0.0, 0.5);
    Outline::default()
        .add(arc(0.0, 0.0, 1.0, 0.9, 0.5, 1.0))
        .cut_all(scallops)
        .add_all(line(&[(0.0, -1.0), (0.0, 0.78)], 0.12))
        .add_all(line(&hook, 0.12))
}

fn bell() -> Outline {
    let half = [
        (0.18, -0.82),
        (0.42, -0.6),
        (0.52, 0.1),
        (0.62, 0.38),
        (0.85, 0.6),
    ];
    let left = half.iter().rev().map(|&(x, y)| (-x, y));
    Outline::default()
        .add(disc(0.0, -0.86, 0.2, 0.2))
        .cut(disc(0.0, -0.88, 0.09, 0.09))
        .add(half.into_iter().chain(left).collect())
        .add(arc(0.0, 0.68, 0.22, 0.24, 0.0, 0.5))
}

fn cup() -> Outline {
    Outline::default()
        .add(disc(0.55, -0.05, 0.46, 0.42))
        .cut(disc(0.55, -0.05, 0.27, 0.23))
        .add(poly(&[
            (-0.8, -0.7),
            (0.52, -0.7),
            (0.4, 0.7),
            (-0.68, 0.7),
        ]))
}

/// Wide and low.
fn bungalow() -> Outline {
    Outline::default()
        .add(rect(0.4, -0.62, 0.62, -0.2))
        .add(poly(&[
            (-0.7, -0.5),
            (0.7, -0.5),
            (1.1, 0.02),
            (-1.1, 0.02),
        ]))
        .add(rect(-0.95, 0.0, 0.95, 0.6))
        .cut(rect(-0.15, 0.15, 0.15, 0.6))
        .cut_all(row(&[-0.55, 0.55], |x| rect(x - 0.18, 0.15, x + 0.18, 0.4)))
}

/// A roof that hangs over a narrow body.
fn chalet() -> Outline {
    Outline::default()
        .add(poly(&[
            (0.0, -0.95),
            (1.1, 0.02),
            (0.98, 0.18),
            (0.0, -0.2),
            (-0.98, 0.18),
            (-1.1, 0.02),
        ]))
        .add(poly(&[
            (0.0, -0.8),
            (0.6, -0.2),
            (0.6, 0.9),
            (-0.6, 0.9),
            (-0.6, -0.2),
        ]))
        .cut(rect(-0.16, 0.42, 0.16, 0.9))
        .cut(disc(0.0, -0.3, 0.17, 0.17))
        .cut_all(row(&[-0.38, 0.38], |x| rect(x - 0.11, 0.15, x + 0.11, 0.4)))
}

/// Tall and narrow.
fn townhouse() -> Outline {
    let windows =
        [-0.5f32, -0.08].map(|y| row(&[-0.21, 0.21], |x| rect(x - 0.11, y, x + 0.11, y + 0.25)));
    Outline::default()
        .add(rect(0.2, -1.05, 0.38, -0.6))
        .add(poly(&[(0.0, -1.1), (0.56, -0.62), (-0.56, -0.62)]))
        .add(rect(-0.46, -0.65, 0.46, 1.0))
        .cut_all(windows.into_iter().flatten())
        .cut(rect(-0.12, 0.5, 0.12, 1.0))
}

fn castle() -> Outline {
    let teeth = [-0.93, -0.7, -0.47, 0.47, 0.7, 0.93];
    Outline::default()
        .add(rect(-0.6, -0.25, 0.6, 0.85))
        .add_all(row(&[-0.25, 0.0, 0.25], |x| {
            rect(x - 0.07, -0.42, x + 0.07, -0.2)
        }))
        .add_all(row(&[-0.7, 0.7], |x| rect(x - 0.3, -0.62, x + 0.3, 0.85)))
        .add_all(row(&teeth, |x| rect(x - 0.07, -0.86, x + 0.07, -0.5)))
        .cut(arc(0.0, 0.42, 0.17, 0.2, 0.5, 1.0))
        .cut(rect(-0.17, 0.41, 0.17, 0.85))
        .cut_all(row(&[-0.7, 0.7], |x| rect(x - 0.07, -0.3, x + 0.07, 0.0)))
}

fn tent() -> Outline {
    Outline::default()
        .add_all(both_lines(&[(0.0, -0.72), (0.2, -1.0)], 0.1))
        .add(poly(&[(0.0, -0.8), (1.05, 0.8), (-1.05, 0.8)]))
        .cut(poly(&[(0.0, -0.25), (0.36, 0.8), (-0.36, 0.8)]))
}
