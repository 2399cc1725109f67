//! Draws a contact sheet: a row of pictures for each class of a task, or rows of pictures of a world.

#![allow(clippy::print_stdout, reason = "the order of the rows is the output")]

use std::error::Error;
use std::fs::File;
use std::io::BufWriter;

use cliptune_scenes::{Picture, SIDE, Task, Wording, World, caption, multi_label};

/// A row's name and pictures.
type Row = (String, Vec<Picture>);

/// Pictures in a row.
const ACROSS: u64 = 10;
/// Enlargement of each pixel.
const ZOOM: usize = 2;
/// White space around each picture in enlarged pixels.
const GAP: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("usage: sheet OUT.png [task | world | easy | multi]")?;
    let rows = rows(arguments.next().as_deref().unwrap_or("world"))?;
    for (i, (name, _)) in rows.iter().enumerate() {
        println!("{i:2} {name}");
    }
    let pictures: Vec<_> = rows.into_iter().map(|row| row.1).collect();
    write_sheet(&path, &pictures)
}

/// Names and pictures of the rows.
fn rows(name: &str) -> Result<Vec<Row>, Box<dyn Error>> {
    let of_world = |draw: &dyn Fn(u64) -> Picture| {
        let rows = (0..12).map(|row| {
            let pictures: Vec<_> = (row * ACROSS..(row + 1) * ACROSS).map(draw).collect();
            let captions = pictures
                .iter()
                .zip(0..)
                .map(|(p, i)| caption(&p.scene, &Wording::full(), row, i));
            (captions.collect::<Vec<_>>().join(" | "), pictures)
        });
        rows.collect()
    };
    Ok(match name {
        "world" => of_world(&|i| World::training().picture(1, i)),
        "easy" => of_world(&|i| World::easy().picture(1, i)),
        "multi" => of_world(&|i| multi_label(1, i)),
        _ => {
            let task = Task::from_slug(name).ok_or("no such task")?;
            let row = |(class, name)| {
                (
                    name,
                    (0..ACROSS).map(|i| task.picture(1, class, i)).collect(),
                )
            };
            task.classes().into_iter().enumerate().map(row).collect()
        }
    })
}

fn write_sheet(path: &str, rows: &[Vec<Picture>]) -> Result<(), Box<dyn Error>> {
    let cell = SIDE * ZOOM + GAP;
    let (width, height) = (ACROSS as usize * cell, rows.len() * cell);
    let mut sheet = vec![255u8; width * height * 3];
    for (row, pictures) in rows.iter().enumerate() {
        for (column, picture) in pictures.iter().enumerate() {
            for y in 0..SIDE * ZOOM {
                for x in 0..SIDE * ZOOM {
                    let to = ((row * cell + y) * width + column * cell + x) * 3;
                    let from = (y / ZOOM * SIDE + x / ZOOM) * 3;
                    sheet[to..to + 3].copy_from_slice(&picture.rgb[from..from + 3]);
                }
            }
        }
    }
    let mut encoder = png::Encoder::new(
        BufWriter::new(File::create(path)?),
        width as u32,
        height as u32,
    );
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header()?.write_image_data(&sheet)?;
    Ok(())
}
