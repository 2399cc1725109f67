//! What is measured: the rows of the comparison and who takes part in each.

use cliptune_core::{Activation, Arch, VisionArch};
use serde::{Deserialize, Serialize};

/// Who computes a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// PyTorch as the authors write it: prompts of 77 tokens, autograd through the whole tower.
    Authors,
    /// The same with prompts cut to the longest.
    Fair,
    /// candle without any of our kernels: 77 tokens, its own autograd.
    Candle,
    /// This workspace, everything saved for the backward pass.
    Ours,
    /// This workspace under the largest memory budget that does not let it save everything: two passes.
    OursTwice,
}

impl Contender {
    /// In the order of the table, which is also the order of a round.
    pub(super) const ALL: [Self; 5] = [
        Self::Authors,
        Self::Fair,
        Self::Candle,
        Self::Ours,
        Self::OursTwice,
    ];

    pub(super) fn slug(self) -> &'static str {
        match self {
            Self::Authors => "authors",
            Self::Fair => "fair",
            Self::Candle => "candle",
            Self::Ours => "ours",
            Self::OursTwice => "ours-twice",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Authors => "PyTorch",
            Self::Fair => "PyTorch, cut",
            Self::Candle => "candle",
            Self::Ours => "ours",
            Self::OursTwice => "ours, two passes",
        }
    }

    pub(super) fn is_torch(self) -> bool {
        matches!(self, Self::Authors | Self::Fair)
    }

    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::OursTwice)
    }
}

/// What one step of a row computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(super) enum Task {
    /// CoOp: one context for all classes, cached image features. Forward, loss, gradient of the context.
    Coop {
        classes: usize,
        /// Classes of one autograd graph, for those who do not fit all into one.
        graph: usize,
        n_ctx: usize,
        batch: usize,
    },
    /// CoCoOp: the context is shifted for each image by a small network of its feature. Forward, loss, all gradients.
    Cocoop {
        classes: usize,
        n_ctx: usize,
        batch: usize,
    },
    /// PLOT: several contexts for all classes, matched to the cached features of places by optimal transport. Forward, loss,
    /// gradient of the contexts.
    Plot {
        classes: usize,
        /// Classes of one of candle's autograd graphs.
        graph: usize,
        n_prompts: usize,
        n_ctx: usize,
        /// Places of an image, beside its global feature.
        places: usize,
        batch: usize,
    },
    /// VPT (variational): samples of one context for all classes, cached image features. Forward, loss, all gradients.
    Vpt {
        classes: usize,
        /// Classes of one of candle's autograd graphs.
        graph: usize,
        samples: usize,
        n_ctx: usize,
        batch: usize,
    },
    /// MaPLe: deep prompts in both towers, those of the image tower made of those of the text tower. Forward, loss, all
    /// gradients.
    Maple {
        classes: usize,
        n_ctx: usize,
        /// Blocks of both towers with prompts, at most as many as there are.
        depth: usize,
        batch: usize,
    },
    /// Deep visual prompt tuning: tokens in the image tower's blocks, class features at hand. Forward, loss, all gradients.
    DeepVpt {
        classes: usize,
        n_ctx: usize,
        /// As for MaPLe.
        depth: usize,
        batch: usize,
    },
    /// VP: a learned frame around every image, class features at hand. Forward, loss, all gradients.
    Vp {
        classes: usize,
        /// Width of the frame, pixels.
        padding: usize,
        batch: usize,
    },
    /// Class features from templates, without gradient.
    ZeroShot {
        templates: usize,
        names: usize,
        /// Prompts that PyTorch and candle encode at a time.
        batch: usize,
    },
    /// The image tower forward, without gradient.
    Image { batch: usize },
}

/// Which published sizes the weights have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sizes {
    /// ViT-B/16's text tower. Cached features need no image tower: a small one stands in, for every contender.
    VitB16Text,
    VitB16,
    /// RN50's text tower, with the same stand-in.
    Rn50Text,
    Rn50,
}

impl Sizes {
    pub(super) fn slug(self) -> &'static str {
        match self {
            Self::VitB16Text => "vit-b16-text",
            Self::VitB16 => "vit-b16",
            Self::Rn50Text => "rn50-text",
            Self::Rn50 => "rn50",
        }
    }

    /// The architecture, or for tests a tiny one of the same kind.
    pub(super) fn arch(self, tiny: bool) -> Arch {
        let vision = match (self, tiny) {
            (Self::VitB16, false) => VisionArch::Vit {
                layers: 12,
                width: 768,
                patch_size: 16,
            },
            (Self::VitB16, true) => VisionArch::Vit {
                layers: 3,
                width: 64,
                patch_size: 16,
            },
            (Self::VitB16Text | Self::Rn50Text, _) => VisionArch::Vit {
                layers: 1,
                width: 64,
                patch_size: 16,
            },
            (Self::Rn50, false) => VisionArch::ResNet {
                layers: [3, 4, 6, 3],
                width: 64,
            },
            (Self::Rn50, true) => VisionArch::ResNet {
                layers: [1, 2, 1, 1],
                width: 4,
            },
        };
        let embed_dim = match self {
            Self::VitB16Text | Self::VitB16 => 512,
            Self::Rn50Text | Self::Rn50 => 1024,
        };
        Arch {
            embed_dim: if tiny { 32 } else { embed_dim },
            image_resolution: if tiny { 64 } else { 224 },
            vision,
            context_length: 77,
            vocab_size: 49_408,
            text_width: if tiny { 64 } else { 512 },
            text_layers: if tiny { 2 } else { 12 },
            activation: Activation::QuickGelu,
        }
    }
}

/// A row of the comparison.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    /// What a reader must know about who did what.
    pub(super) note: &'static str,
    pub(super) sizes: Sizes,
    pub(super) task: Task,
}

impl Row {
    /// All rows, in the order in which they are run.
    pub(super) fn all() -> Vec<Self> {
        let coop = |classes| Task::Coop {
            classes,
            graph: 100,
            n_ctx: 16,
            batch: 32,
        };
        vec![
            Self {
                name: "coop-100",
                title: "CoOp step: 100 classes, 16 context tokens, batch 32, cached image features",
                note: "Forward, loss and the context's gradient. \"Cut\" is PyTorch with the prompts cut to the longest of them.",
                sizes: Sizes::VitB16Text,
                task: coop(100),
            },
            Self {
                name: "coop-1000",
                title: "CoOp step: 1,000 classes, 16 context tokens, batch 32, cached image features",
                note: "PyTorch and candle hold one autograd graph of 100 classes at a time; what is timed is the forward and backward \
                       pass of one such graph a round, times 10. Summed gradients also need all features before the loss, so \
                       one more forward pass, which is made in the check but not counted in the time. candle's \
                       check covers the features of the first 100 classes.",
                sizes: Sizes::VitB16Text,
                task: coop(1000),
            },
            Self {
                name: "cocoop",
                title: "CoCoOp step: 50 classes, 4 context tokens, batch 4, cached image features",
                note: "Forward, loss and the gradients of context and meta-network. PyTorch and candle loop over the images, as the authors do; candle's autograd also forms gradients of frozen weights.",
                sizes: Sizes::VitB16Text,
                task: Task::Cocoop {
                    classes: 50,
                    n_ctx: 4,
                    batch: 4,
                },
            },
            Self {
                name: "plot",
                title: "PLOT step: 100 classes, 4 contexts of 16 tokens, batch 32, RN50's 49 places, cached image features",
                note: "Forward, loss and the contexts' gradient; 400 prompts in one pass, and the plans of 3,200 transport problems by \
                       the authors' stopping rule, held constant. candle's graphs are those of 25 classes, what is timed is one of \
                       them a round, times 4; the forward pass that summed gradients need before the loss is made in the \
                       check only.",
                sizes: Sizes::Rn50Text,
                task: Task::Plot {
                    classes: 100,
                    graph: 25,
                    n_prompts: 4,
                    n_ctx: 16,
                    places: 49,
                    batch: 32,
                },
            },
            Self {
                name: "vpt",
                title: "VPT (variational) step: 40 classes, 10 samples, 4 context tokens, 1 image, cached image features",
                note: "The authors' `coopvpt` at their batch of one image, so that each sample of each image has a context of its \
                       own. Forward, loss and the gradients of context, mean and log-variance; 400 prompts in one pass. 40 classes, \
                       not 100, of which PyTorch's graph would take 41 GB. candle's graphs are those of 10 classes, what is timed is \
                       one of them a round, times 4, as for plot.",
                sizes: Sizes::VitB16Text,
                task: Task::Vpt {
                    classes: 40,
                    graph: 10,
                    samples: 10,
                    n_ctx: 4,
                    batch: 1,
                },
            },
            Self {
                name: "maple",
                title: "MaPLe step: 100 classes, 2 prompt tokens in each of 9 blocks, batch 4, both towers of ViT-B/16",
                note: "Forward, loss and the gradients of prompts and maps; 100 prompts and 4 images through the towers. \"Cut\" shortens \
                       the text prompts alone: there is nothing to cut in an image.",
                sizes: Sizes::VitB16,
                task: Task::Maple {
                    classes: 100,
                    n_ctx: 2,
                    depth: 9,
                    batch: 4,
                },
            },
            Self {
                name: "deep-vpt",
                title: "Deep visual prompt tuning step: 8 tokens in each of 12 blocks, batch 4, ViT-B/16's image tower",
                note: "Forward, loss and the prompts' gradients; the features of 100 classes are at hand.",
                sizes: Sizes::VitB16,
                task: Task::DeepVpt {
                    classes: 100,
                    n_ctx: 8,
                    depth: 12,
                    batch: 4,
                },
            },
            Self {
                name: "vp",
                title: "VP step: a frame of 30 pixels, batch 8, ViT-B/16's image tower",
                note: "Forward, loss and the frame's gradients; the features of 100 classes are at hand.",
                sizes: Sizes::VitB16,
                task: Task::Vp {
                    classes: 100,
                    padding: 30,
                    batch: 8,
                },
            },
            Self {
                name: "zeroshot",
                title: "Zero-shot class features: a sample of 8 templates × 40 names",
                note: "Every tenth of the 80 ImageNet templates and 40 of the 1,000 names; no gradient. PyTorch and candle encode \
                       80 prompts at a time, as many classes as that is; we all at once, each template's beginning shared.",
                sizes: Sizes::VitB16Text,
                task: Task::ZeroShot {
                    templates: 8,
                    names: 40,
                    batch: 80,
                },
            },
            Self {
                name: "vit-b16",
                title: "Image tower forward: ViT-B/16, batch 8",
                note: "No gradient.",
                sizes: Sizes::VitB16,
                task: Task::Image { batch: 8 },
            },
            Self {
                name: "rn50",
                title: "Image tower forward: RN50, batch 8",
                note: "No gradient.",
                sizes: Sizes::Rn50,
                task: Task::Image { batch: 8 },
            },
        ]
    }

    /// Whether it is one of the pair that shows how memory grows with the number of classes.
    pub(super) fn grows(&self) -> bool {
        matches!(self.task, Task::Coop { .. })
    }

    /// Who takes part. There is nothing to cut in an image.
    pub(super) fn contenders(&self) -> Vec<Contender> {
        let takes_part = |contender: &Contender| match contender {
            Contender::Fair => !matches!(
                self.task,
                Task::Image { .. } | Task::DeepVpt { .. } | Task::Vp { .. }
            ),
            Contender::OursTwice => self.grows(),
            _ => true,
        };
        Contender::ALL.into_iter().filter(takes_part).collect()
    }

    /// Whether a contender's check covers the whole step, so that it can be what others are compared with.
    pub(super) fn checks_whole(&self, contender: Contender) -> bool {
        let partly = matches!(self.task, Task::Coop { .. }) && self.scale(contender) > 1;
        contender != Contender::Candle || !partly
    }

    /// How many times the timed part makes the whole step.
    pub(super) fn scale(&self, contender: Contender) -> usize {
        match self.task {
            Task::Coop { classes, graph, .. } if !contender.is_ours() => classes.div_ceil(graph),
            Task::Plot { classes, graph, .. } | Task::Vpt { classes, graph, .. }
                if contender == Contender::Candle =>
            {
                classes.div_ceil(graph)
            }
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_into_one_graph_is_a_sample_and_only_for_others() {
        for row in Row::all() {
            for contender in row.contenders() {
                let candle = contender == Contender::Candle;
                let scale = match row.name {
                    "coop-1000" if !contender.is_ours() => 10,
                    "plot" | "vpt" if candle => 4,
                    _ => 1,
                };
                assert_eq!(row.scale(contender), scale, "{}", row.name);
                let partly = candle && row.name == "coop-1000";
                assert_eq!(row.checks_whole(contender), !partly, "{}", row.name);
            }
        }
    }
}
