//! The tensors that a method learns: ordered, named, seeded.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Shape, Tensor, Var};

use crate::rng::Rng;
use crate::{Error, Result};

/// A learned tensor, f32. Clones share the value.
#[derive(Clone, Debug)]
pub struct Param {
    name: String,
    var: Var,
}

impl Param {
    /// The authors' state-dict key.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The present value; gradients flow to it.
    pub fn tensor(&self) -> &Tensor {
        self.var.as_tensor()
    }

    /// Replaces the value; whoever shares the parameter sees the new one.
    ///
    /// # Errors
    /// If the shape or type is another.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        Ok(self.var.set(value)?)
    }

    /// A copy of the present value, without a gradient; later updates do not reach it.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn value(&self) -> Result<Tensor> {
        Ok(self.var.as_detached_tensor().copy()?)
    }
}

/// Every tensor that a method learns, in the order in which they were made.
#[derive(Clone, Debug)]
pub struct Params {
    seed: u64,
    list: Vec<Param>,
    /// What the names of new parameters begin with.
    prefix: String,
}

impl Params {
    /// No parameters yet; what is drawn later depends on `seed` and on each parameter's name, not on the order.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            list: Vec::new(),
            prefix: String::new(),
        }
    }

    /// Lets the names of all that `make` makes begin with `prefix`, as the keys of a module's parameters do.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn below<T>(
        &mut self,
        prefix: &str,
        make: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let outer = self.prefix.len();
        self.prefix.push_str(prefix);
        let made = make(self);
        self.prefix.truncate(outer);
        made
    }

    /// The seed that what is drawn depends on.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A parameter drawn from N(0, std²).
    ///
    /// # Errors
    /// [`Error::Config`] if the name is taken.
    pub fn normal(&mut self, name: &str, shape: impl Into<Shape>, std: f64) -> Result<Param> {
        let shape = shape.into();
        let mut rng = self.stream(name);
        let values: Vec<f32> = rng
            .normal(shape.elem_count())
            .into_iter()
            .map(|x| (x * std) as f32)
            .collect();
        self.add(name, Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// A parameter drawn evenly from `low` to `high`.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is taken.
    pub fn uniform(
        &mut self,
        name: &str,
        shape: impl Into<Shape>,
        (low, high): (f64, f64),
    ) -> Result<Param> {
        let shape = shape.into();
        let mut rng = self.stream(name);
        let values: Vec<f32> = (0..shape.elem_count())
            .map(|_| (low + (high - low) * rng.uniform()) as f32)
            .collect();
        self.add(name, Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// A parameter that starts as a copy of `value`.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is taken.
    pub fn copied(&mut self, name: &str, value: &Tensor) -> Result<Param> {
        self.add(name, value.to_dtype(DType::F32)?)
    }

    /// What a new parameter is drawn from.
    fn stream(&self, name: &str) -> Rng {
        Rng::stream(self.seed, &format!("init/{}{name}", self.prefix), &[])
    }

    fn add(&mut self, name: &str, value: Tensor) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        if self.get(&name).is_some() {
            return Err(Error::config("parameter", name, "the name is taken"));
        }
        // A copy: a variable is updated in place, and must not share memory with what it started from.
        let param = Param {
            name,
            var: Var::from_tensor(&value.detach().copy()?)?,
        };
        self.list.push(param.clone());
        Ok(param)
    }

    /// The parameter called `name`.
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.list.iter().find(|p| p.name == name)
    }

    /// All parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.list.iter()
    }

    /// The parameters that `keep` chooses, sharing their values with these: an optimiser's group.
    pub fn group(&self, keep: impl Fn(&Param) -> bool) -> Self {
        Self {
            seed: self.seed,
            list: self.list.iter().filter(|p| keep(p)).cloned().collect(),
            prefix: String::new(),
        }
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether nothing is learned.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Number of learned numbers.
    pub fn count(&self) -> usize {
        self.list.iter().map(|p| p.tensor().elem_count()).sum()
    }

    /// Replaces every value by the tensor of the same name.
    ///
    /// # Errors
    /// [`Error::Prompt`] if one is missing, [`Error::Shape`] if one has another shape, [`Error::NotFinite`]; nothing is
    /// changed then.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut values = Vec::with_capacity(self.len());
        for param in &self.list {
            let value = tensors.get(&param.name).ok_or_else(|| {
                Error::Prompt(format!("learned tensor `{}` is missing", param.name))
            })?;
            if value.dims() != param.tensor().dims() {
                return Err(Error::Shape {
                    what: format!("learned tensor `{}`", param.name),
                    found: value.dims().to_vec(),
                    expected: param.tensor().dims().to_vec(),
                });
            }
            let value = value.to_dtype(DType::F32)?;
            check_finite(&value, &format!("learned tensor `{}`", param.name))?;
            values.push(value);
        }
        for (param, value) in self.list.iter().zip(values) {
            param.var.set(&value)?;
        }
        Ok(())
    }

    /// Names and copies of the values, as they are saved.
    ///
    /// # Errors
    /// As [`Param::value`].
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.list
            .iter()
            .map(|p| Ok((p.name.clone(), p.value()?)))
            .collect()
    }

    pub(crate) fn set(&self, index: usize, value: &Tensor) -> Result<()> {
        Ok(self.list[index].var.set(value)?)
    }
}

/// Refuses NaN and infinities.
pub(crate) fn check_finite(tensor: &Tensor, what: &str) -> Result<()> {
    let values = tensor
        .flatten_all()?
        .to_dtype(DType::F32)?
        .to_vec1::<f32>()?;
    match values.into_iter().find(|v| !v.is_finite()) {
        Some(value) => Err(Error::NotFinite {
            what: what.to_owned(),
            value: f64::from(value),
        }),
        None => Ok(()),
    }
}

/// Gradients of a step, one per parameter, in their order. A method may reshape them before the optimiser sees them.
#[derive(Debug)]
pub struct Gradients {
    names: Vec<String>,
    list: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Runs the loss backward.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn of(loss: &Tensor, params: &Params) -> Result<Self> {
        let store: GradStore = loss.backward()?;
        Ok(Self {
            names: params.iter().map(|p| p.name.clone()).collect(),
            list: params
                .iter()
                .map(|p| store.get(p.tensor()).map(Tensor::detach))
                .collect(),
        })
    }

    /// The gradient of `name`; `None` if the loss does not depend on it.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        let index = self.names.iter().position(|n| n == name)?;
        self.list[index].as_ref()
    }

    /// Replaces the gradient of `name`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such parameter.
    pub fn set(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        match self.names.iter().position(|n| n == name) {
            Some(index) => self.list[index] = Some(gradient),
            None => {
                return Err(Error::config(
                    "parameter",
                    name,
                    format!("one of {:?}", self.names),
                ));
            }
        }
        Ok(())
    }

    /// The sum of gradients of the same parameters, in the order of the list: the same bits whoever computed them.
    ///
    /// # Errors
    /// [`Error::Config`] if the parameters differ.
    pub fn sum(parts: Vec<Self>) -> Result<Self> {
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or(Self {
            names: Vec::new(),
            list: Vec::new(),
        });
        for part in parts {
            if part.names != sum.names {
                return Err(Error::config(
                    "gradients",
                    format!("{:?}", part.names),
                    format!("those of {:?}", sum.names),
                ));
            }
            for (sum, part) in sum.list.iter_mut().zip(part.list) {
                *sum = match (sum.take(), part) {
                    (Some(a), Some(b)) => Some((a + b)?),
                    (a, b) => a.or(b),
                };
            }
        }
        Ok(sum)
    }

    /// Scales all gradients down so that their common length is at most `limit`, and returns the length before
    /// (`clip_grad_norm_`).
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the length is not a number.
    pub fn clip_norm(&mut self, limit: f64) -> Result<f64> {
        let mut square = 0.0;
        for gradient in self.list.iter().flatten() {
            square += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let norm = square.sqrt();
        if !norm.is_finite() {
            return Err(Error::NotFinite {
                what: "the gradient's length".into(),
                value: norm,
            });
        }
        if norm > limit {
            for gradient in self.list.iter_mut().flatten() {
                *gradient = (&*gradient * (limit / norm))?;
            }
        }
        Ok(norm)
    }

    /// The gradients of a group ([`Params::group`]) of the parameters.
    pub fn group(&self, params: &Params) -> Self {
        Self {
            names: params.iter().map(|p| p.name.clone()).collect(),
            list: params.iter().map(|p| self.get(&p.name).cloned()).collect(),
        }
    }

    /// Names and gradients in the parameters' order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&Tensor>)> {
        self.names
            .iter()
            .map(String::as_str)
            .zip(self.list.iter().map(Option::as_ref))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_depend_on_name_and_seed_only() -> Result<()> {
        let draw = |seed, names: &[&str]| -> Result<Vec<f32>> {
            let mut params = Params::new(seed);
            for name in names {
                params.normal(name, (2, 3), 0.02)?;
            }
            Ok(params
                .get("ctx")
                .ok_or(Error::Cancelled)?
                .value()?
                .flatten_all()?
                .to_vec1()?)
        };
        assert_eq!(draw(1, &["ctx", "other"])?, draw(1, &["other", "ctx"])?);
        assert_ne!(draw(1, &["ctx"])?, draw(2, &["ctx"])?);
        Ok(())
    }

    #[test]
    fn a_prefix_ends_with_what_is_made_below_it() -> Result<()> {
        let mut params = Params::new(1);
        params.below("a.", |params| {
            params.normal("x", 2, 1.0)?;
            params.below("b.", |params| params.uniform("x", 2, (0.0, 1.0)))
        })?;
        let failed = params.below("c.", |_| -> Result<()> { Err(Error::Cancelled) });
        assert!(failed.is_err());
        params.copied("x", &Tensor::zeros(2, DType::F32, &Device::Cpu)?)?;
        let names: Vec<_> = params.iter().map(Param::name).collect();
        assert_eq!(names, ["a.x", "a.b.x", "x"]);
        // What is drawn depends on the whole name.
        let mut whole = Params::new(1);
        whole.normal("a.x", 2, 1.0)?;
        let value = |params: &Params| -> Result<Vec<f32>> {
            let param = params.get("a.x").ok_or(Error::Cancelled)?;
            Ok(param.value()?.to_vec1()?)
        };
        assert_eq!(value(&whole)?, value(&params)?);
        Ok(())
    }

    #[test]
    fn gradients_add_up_and_are_clipped_together() -> Result<()> {
        let mut params = Params::new(0);
        let (a, b) = (params.normal("a", 3, 1.0)?, params.normal("b", 2, 1.0)?);
        params.normal("unused", 2, 1.0)?;
        let first = (a.tensor() * 3.0)?.sum_all()?;
        let second = (a.tensor().sum_all()? + (b.tensor() * 6.0)?.sum_all()?)?;
        let parts = [&first, &second].map(|loss| Gradients::of(loss, &params));
        let mut sum = Gradients::sum(parts.into_iter().collect::<Result<_>>()?)?;
        let values =
            |g: &Gradients, name: &str| g.get(name).map(|g| g.to_vec1::<f32>()).transpose();
        assert_eq!(values(&sum, "a")?, Some(vec![4.0; 3]));
        assert_eq!(values(&sum, "b")?, Some(vec![6.0; 2]));
        assert!(sum.get("unused").is_none());

        let length = (3.0f64 * 16.0 + 2.0 * 36.0).sqrt();
        assert!((sum.clip_norm(1000.0)? - length).abs() < 1e-5);
        assert_eq!(values(&sum, "a")?, Some(vec![4.0; 3]));
        sum.clip_norm(length / 2.0)?;
        assert!((sum.clip_norm(1000.0)? - length / 2.0).abs() < 1e-5);
        let only_b = params.group(|p| p.name() == "b");
        assert_eq!(sum.group(&only_b).iter().count(), 1);
        let broken = Gradients::of(&(a.tensor() * f64::NAN)?.sum_all()?, &params)?.clip_norm(1.0);
        assert!(matches!(broken, Err(Error::NotFinite { .. })));
        assert!(Gradients::sum(vec![sum.group(&only_b), sum]).is_err());
        Ok(())
    }

    #[test]
    fn loading_is_all_or_nothing() -> Result<()> {
        let mut params = Params::new(0);
        params.normal("a", 2, 1.0)?;
        params.normal("b", 2, 1.0)?;
        let before = params.tensors()?[0].1.to_vec1::<f32>()?;
        let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
        let mut tensors = BTreeMap::from([("a".to_owned(), ones.clone())]);
        assert!(
            params
                .load(&tensors)
                .unwrap_err()
                .to_string()
                .contains("`b` is missing")
        );
        tensors.insert("b".into(), Tensor::new(&[f32::NAN, 1.0], &Device::Cpu)?);
        assert!(
            params
                .load(&tensors)
                .unwrap_err()
                .to_string()
                .contains("NaN")
        );
        assert_eq!(params.tensors()?[0].1.to_vec1::<f32>()?, before);
        tensors.insert("b".into(), ones);
        params.load(&tensors)?;
        assert_eq!(params.tensors()?[0].1.to_vec1::<f32>()?, [1.0, 1.0]);
        Ok(())
    }

    #[test]
    fn a_copied_parameter_does_not_share_memory() -> Result<()> {
        let start = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
        let mut params = Params::new(0);
        params.copied("a", &start)?;
        params.set(0, &Tensor::ones(2, DType::F32, &Device::Cpu)?)?;
        assert_eq!(start.to_vec1::<f32>()?, [0.0, 0.0]);
        Ok(())
    }
}
