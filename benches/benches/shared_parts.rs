//! What several methods share, at the papers' sizes: PLOT's transport (batch 32, 100 classes, RN50's 49 places, 4 prompts)
//! and SubPT's subspace (50 contexts of 16 × 512 numbers, rank 10).

#![allow(clippy::unwrap_used, missing_docs)]

use cliptune_benches::normal;
use cliptune_core::subspace::Subspace;
use cliptune_core::transport::{Domain, Sinkhorn, StopRule};
use criterion::{Criterion, criterion_group, criterion_main};

fn transport(c: &mut Criterion) {
    let mut group = c.benchmark_group("transport, 3200 problems of 49 × 4");
    group.sample_size(10);
    // Cosines spread by 0.05 around 0.2, as those of CLIP's places and prompts.
    let cost = (normal(&[3200, 49, 4]).unwrap() * -0.05).unwrap();
    let cost = (cost + 0.8).unwrap();
    for (name, domain, stop) in [
        ("kernel, the authors' rule", Domain::Kernel, StopRule::Batch),
        ("kernel, per problem", Domain::Kernel, StopRule::PerProblem),
        ("log, the authors' rule", Domain::Log, StopRule::Batch),
    ] {
        let settings = Sinkhorn {
            domain,
            stop,
            ..Sinkhorn::default()
        };
        group.bench_function(name, |b| b.iter(|| settings.solve(&cost).unwrap()));
    }
}

fn subspace(c: &mut Criterion) {
    let mut group = c.benchmark_group("subspace of 50 × 8192, rank 10");
    group.sample_size(10);
    let rows = normal(&[50, 8192]).unwrap();
    group.bench_function("principal", |b| {
        b.iter(|| Subspace::principal(&rows, 10).unwrap());
    });
    let found = Subspace::principal(&rows, 10).unwrap().subspace;
    let gradient = normal(&[16, 512]).unwrap();
    group.bench_function("project", |b| b.iter(|| found.project(&gradient).unwrap()));
}

criterion_group!(benches, transport, subspace);
criterion_main!(benches);
