//! Sixteen numbers at a time, in each instruction set, and the types that a panel may hold them in.

use half::{bf16, f16};

/// Columns of a panel, and numbers of a [`Lanes`].
pub(super) const LANES: usize = 16;

/// Sixteen numbers in the registers of an instruction set.
///
/// # Safety
/// Methods may be called only where the processor has the instruction set; pointers must be valid for sixteen elements.
pub(super) trait Lanes: Copy {
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_half(from: *const f16) -> Self;
    unsafe fn load_brain(from: *const bf16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn plus(self, other: Self) -> Self;
    /// `self + x · y`.
    unsafe fn plus_product(self, x: f32, y: Self) -> Self;
}

/// A number type of panels.
pub(super) trait Element: Copy {
    /// Whether loading takes more than moving.
    const NARROW: bool;

    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Element for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: handed on.
        unsafe { L::load(from) }
    }
}

impl Element for f16 {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: handed on.
        unsafe { L::load_half(from) }
    }
}

impl Element for bf16 {
    const NARROW: bool = true;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: handed on.
        unsafe { L::load_brain(from) }
    }
}

/// For processors without a version of their own; the compiler vectorises it for what the target always has.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; LANES]);

impl Lanes for Plain {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: sixteen elements.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f16) -> Self {
        // SAFETY: sixteen elements.
        Self(unsafe { from.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32))
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const bf16) -> Self {
        // SAFETY: sixteen elements.
        Self(unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: sixteen elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn plus_product(self, x: f32, y: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + x * y.0[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm_loadu_si128, _mm256_add_ps, _mm256_castsi256_ps, _mm256_cvtepu16_epi32,
        _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_add_ps, _mm512_castsi512_ps,
        _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use half::{bf16, f16};

    use super::Lanes;

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2([__m256; 2]);

    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller has the features.
            unsafe { Self([_mm256_setzero_ps(); 2]) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: sixteen elements; the caller has the features.
            unsafe { Self([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]) }
        }
        #[inline(always)]
        unsafe fn load_half(from: *const f16) -> Self {
            // SAFETY: sixteen elements; the caller has the features.
            unsafe {
                let half = |at: *const f16| _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
                Self([half(from), half(from.add(8))])
            }
        }
        #[inline(always)]
        unsafe fn load_brain(from: *const bf16) -> Self {
            // SAFETY: sixteen elements; the caller has the features. A bf16 is the upper half of an f32.
            unsafe {
                let part = |at: *const bf16| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                };
                Self([part(from), part(from.add(8))])
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: sixteen elements; the caller has the features.
            unsafe {
                _mm256_storeu_ps(to, self.0[0]);
                _mm256_storeu_ps(to.add(8), self.0[1]);
            }
        }
        #[inline(always)]
        unsafe fn plus(self, other: Self) -> Self {
            // SAFETY: the caller has the features.
            unsafe {
                Self([
                    _mm256_add_ps(self.0[0], other.0[0]),
                    _mm256_add_ps(self.0[1], other.0[1]),
                ])
            }
        }
        #[inline(always)]
        unsafe fn plus_product(self, x: f32, y: Self) -> Self {
            // SAFETY: the caller has the features.
            unsafe {
                let x = _mm256_set1_ps(x);
                Self([
                    _mm256_fmadd_ps(x, y.0[0], self.0[0]),
                    _mm256_fmadd_ps(x, y.0[1], self.0[1]),
                ])
            }
        }
    }

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512);

    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller has the feature.
            unsafe { Self(_mm512_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: sixteen elements; the caller has the feature.
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_half(from: *const f16) -> Self {
            // SAFETY: sixteen elements; the caller has the feature.
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_brain(from: *const bf16) -> Self {
            // SAFETY: sixteen elements; the caller has the feature. A bf16 is the upper half of an f32.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: sixteen elements; the caller has the feature.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn plus(self, other: Self) -> Self {
            // SAFETY: the caller has the feature.
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn plus_product(self, x: f32, y: Self) -> Self {
            // SAFETY: the caller has the feature.
            unsafe { Self(_mm512_fmadd_ps(_mm512_set1_ps(x), y.0, self.0)) }
        }
    }
}
