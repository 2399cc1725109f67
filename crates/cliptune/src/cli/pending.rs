use super::progress::Show;
use cliptune::{Clip, ImageNeeds, ImageSource, View};
use std::path::Path;
use std::sync::Arc;
#[derive(Debug)]
pub(crate) struct CachedFeatures(Arc<dyn ImageSource>);
impl CachedFeatures {
    pub(crate) fn new(
        inner: Arc<dyn ImageSource>,
        _: &Clip,
        _: Option<&Path>,
    ) -> anyhow::Result<Self> {
        Ok(CachedFeatures(inner))
    }
    pub(crate) fn prepare(
        &self,
        _: &Clip,
        _: &[usize],
        _: ImageNeeds,
        _: View,
        _: &mut Show,
    ) -> anyhow::Result<()> {
        Ok(())
    }
    pub(crate) fn into_source(self) -> Arc<dyn ImageSource> {
        self.0
    }
}
