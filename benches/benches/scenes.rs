//! How fast the picture world is drawn and captioned.

#![allow(missing_docs)]

use cliptune_scenes::{Task, Wording, World, caption};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn pictures(c: &mut Criterion) {
    const COUNT: u64 = 500;
    let mut group = c.benchmark_group("scenes");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(COUNT));
    let world = World::training();
    group.bench_function("pictures on all cores", |b| {
        b.iter(|| world.pictures(1, 0..COUNT))
    });
    group.bench_function("pictures on one core", |b| {
        b.iter(|| (0..COUNT).for_each(|i| drop(world.picture(1, i))));
    });
    let scenes: Vec<_> = world
        .pictures(1, 0..COUNT)
        .into_iter()
        .map(|p| p.scene)
        .collect();
    let wording = Wording::full();
    group.bench_function("captions on one core", |b| {
        b.iter(|| {
            scenes
                .iter()
                .zip(0..)
                .for_each(|(scene, i)| drop(caption(scene, &wording, 1, i)))
        });
    });
    group.bench_function("pictures of a task on one core", |b| {
        b.iter(|| (0..COUNT).for_each(|i| drop(Task::Shape.picture(1, i as usize % 36, i))));
    });
}

criterion_group!(benches, pictures);
criterion_main!(benches);
