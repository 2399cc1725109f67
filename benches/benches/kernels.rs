//! The kernels below a step, on one thread: rates are in floating-point operations (or elements) a second.
//!
//! Shapes are those of ViT-B/16's text tower (width 512; 17 rows are a prefix of [SOS] and 16 context tokens, 120 a chunk) and
//! image tower (width 768, 197 rows an image). The peer of the products is the `gemm` crate, which candle uses.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use cliptune_core::internals::{
    Matrix, TextAttention, layer_norm, layer_norm_backward, quick_gelu,
};
use cliptune_core::rng::Rng;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn numbers(n: usize) -> Vec<f32> {
    let values = Rng::stream(n as u64, "kernels", &[]).normal(n);
    values.into_iter().map(|x| x as f32).collect()
}

/// As f16 holds them, like published weights.
fn rounded(n: usize) -> Vec<f32> {
    let round = |x: f32| half::f16::from_f32(x).to_f32();
    numbers(n).into_iter().map(round).collect()
}

/// `out (m, n) = a (m, k) · b (k, n)` by the `gemm` crate.
fn by_gemm(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize), out: &mut [f32]) {
    assert!(a.len() >= m * k && b.len() >= k * n && out.len() >= m * n);
    // SAFETY: the sizes above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("product");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(1))
        .warm_up_time(Duration::from_millis(300));
    let text = [(512, 1536), (512, 512), (512, 2048), (2048, 512)];
    let image = [(768, 2304), (768, 3072), (3072, 768)];
    let shapes = [17, 120]
        .into_iter()
        .flat_map(|m| text.map(|(k, n)| (m, k, n)))
        .chain(image.map(|(k, n)| (197, k, n)));
    for (m, k, n) in shapes {
        let a = numbers(m * k);
        let mut out = vec![0.0; m * n];
        let name = format!("{m}x{k}x{n}");
        group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
        for (storage, values) in [("f16-held", rounded(k * n)), ("f32-held", numbers(k * n))] {
            let b = Matrix::new((k, n), &values);
            group.bench_function(BenchmarkId::new(storage, &name), |bench| {
                bench.iter(|| b.multiply(&a, m, &mut out));
            });
        }
        let b = numbers(k * n);
        group.bench_function(BenchmarkId::new("gemm crate", &name), |bench| {
            bench.iter(|| by_gemm(&a, &b, (m, k, n), &mut out));
        });
    }
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("text attention, 17 + 5 keys, width 512");
    let mut attention = TextAttention::new(17, 24, 5, 512, numbers);
    let rows = attention.rows();
    let (mut out, d_out) = (vec![0.0; rows * 512], numbers(rows * 512));
    group.throughput(Throughput::Elements(attention.flops() as u64));
    group.bench_function("forward", |b| b.iter(|| attention.forward(&mut out)));
    let (mut d_qkv, mut owing) = (vec![0.0; rows * 3 * 512], vec![0.0; 17 * 2 * 512]);
    // Scores again, then four products for each of forward's two.
    group.throughput(Throughput::Elements(attention.flops() as u64 * 5 / 2));
    group.bench_function("backward", |b| {
        b.iter(|| attention.backward(&d_out, &mut d_qkv, &mut owing));
    });
}

fn row_passes(c: &mut Criterion) {
    let mut group = c.benchmark_group("120 rows");
    for width in [512, 768] {
        let (x, dy) = (numbers(120 * width), numbers(120 * width + 1));
        let (gain, bias) = (numbers(width), numbers(width));
        let mut out = vec![0.0; 120 * width];
        group.throughput(Throughput::Elements((120 * width) as u64));
        group.bench_function(BenchmarkId::new("LayerNorm", width), |b| {
            b.iter(|| layer_norm(&x, &gain, &bias, &mut out));
        });
        group.bench_function(BenchmarkId::new("LayerNorm backward", width), |b| {
            b.iter(|| layer_norm_backward(&x, &gain, &dy, &mut out));
        });
        let x = numbers(120 * 4 * width);
        let mut out = vec![0.0; x.len()];
        group.throughput(Throughput::Elements(x.len() as u64));
        group.bench_function(BenchmarkId::new("QuickGELU", 4 * width), |b| {
            b.iter(|| quick_gelu(&x, &mut out));
        });
    }
}

criterion_group!(benches, products, attention, row_passes);
criterion_main!(benches);
