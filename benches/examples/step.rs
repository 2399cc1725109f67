use std::time::Instant;
use cliptune_core::prompt::{ClassTokens, ClassTokenPosition, placeholder};
use cliptune_benches::*;
fn main() {
    cliptune_core::one_candle_thread();
    let n: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let mut clip = vit_b16().unwrap();
    if let Some(mb) = std::env::args().nth(2) { clip.set_memory_budget(Some(mb.parse::<u64>().unwrap() << 20)); }
    let classes = classes(n).unwrap();
    let tokens = ClassTokens::new(clip.text(), &classes).unwrap();
    let ctx = candle_core::Var::from_tensor(&(normal(&[16, 512]).unwrap() * 0.02).unwrap()).unwrap();
    let rss = || { let s = std::fs::read_to_string("/proc/self/status").unwrap(); s.lines().filter(|l| l.starts_with("VmHWM") || l.starts_with("VmRSS")).map(|l| l.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.).collect::<Vec<_>>() };
    let prompts = tokens.weave(ctx.as_tensor(), &placeholder(16), ClassTokenPosition::End).unwrap();
    println!("{:?}", clip.text().forecast(&prompts).unwrap());
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let base = rss();
    let g = normal(&[n, 512]).unwrap();
    for _ in 0..6 {
        let t = Instant::now();
        let out = clip.text().encode(&prompts).unwrap();
        let forward = t.elapsed();
        let loss = (out * &g).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let d = grads.get(ctx.as_tensor()).unwrap();
        println!("forward {:.3} all {:.3} grad {:.6}", forward.as_secs_f64(), t.elapsed().as_secs_f64(), d.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
    }
    {
        use cliptune_core::train::*;
        let mut coop = cliptune_text_pt::CoOp::new(&Default::default(), &clip, &classes, 1).unwrap();
        let images = cliptune_core::ImageBatch::of_features(normal(&[32, 512]).unwrap());
        let labels: Vec<u32> = (0..32).map(|i| i % n as u32).collect();
        let batch = Batch { images: &images, labels: &labels, classes: &tokens };
        let step = Step { seed: 0, epoch: 0, epochs: 1, index: 0, steps: 1 };
        for scale in [1.0, 1e-10, 1e-20, 1e-30] {
            let t = Instant::now();
            let (loss, _) = gradients(&mut coop, &clip, &batch, step).unwrap();
            println!("coop {:.3} {:?}", t.elapsed().as_secs_f64(), loss.total.to_scalar::<f32>());
            let out = clip.text().encode(&prompts).unwrap();
            let loss = (out * (&g * scale).unwrap()).unwrap().sum_all().unwrap();
            let t = Instant::now();
            loss.backward().unwrap();
            println!("back {:.3} {scale}", t.elapsed().as_secs_f64());
        }
    }
    println!("base {base:?} after {:?}", rss());
}
