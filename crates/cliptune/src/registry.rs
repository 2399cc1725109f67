//! Every method this build knows, by name.

use cliptune_core::method::Entry;
use cliptune_core::{Error, Result};

/// The methods of all families that are compiled in, in the order in which they are listed.
pub fn methods() -> Vec<Entry> {
    [
        #[cfg(feature = "text-pt")]
        cliptune_text_pt::METHODS,
        #[cfg(feature = "multimodal-pt")]
        cliptune_multimodal_pt::METHODS,
        #[cfg(feature = "visual-pt")]
        cliptune_visual_pt::METHODS,
    ]
    .concat()
}

/// The method called `slug`.
///
/// # Errors
/// [`Error::Config`] with the name that was probably meant, or all of them.
pub fn find(slug: &str) -> Result<Entry> {
    let methods = methods();
    if let Some(entry) = methods.iter().find(|entry| entry.slug == slug) {
        return Ok(*entry);
    }
    let slugs: Vec<&str> = methods.iter().map(|entry| entry.slug).collect();
    let expected = match closest(slug, slugs.iter().copied()) {
        Some(meant) => format!("no such method; did you mean `{meant}`?"),
        None => format!(
            "no such method; this build has {}",
            if slugs.is_empty() {
                "none".to_owned()
            } else {
                slugs.join(", ")
            }
        ),
    };
    Err(Error::config("method", slug, expected))
}

/// The candidate that differs from `found` by a slip of the fingers at most.
pub fn closest<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace(['-', ' '], "_");
    let found = plain(found);
    let distance = |candidate: &str| strsim::osa_distance(&found, &plain(candidate));
    candidates
        .into_iter()
        .map(|candidate| (distance(candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 1.max(candidate.chars().count() / 3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_understood() {
        let known = ["coop", "zeroshot", "train.batch_size"];
        assert_eq!(closest("CoOp", known), Some("coop"));
        assert_eq!(closest("zero-shot", known), Some("zeroshot"));
        assert_eq!(closest("train.batchsize", known), Some("train.batch_size"));
        assert_eq!(closest("maple", known), None);
    }

    #[test]
    fn slugs_are_unique_and_their_defaults_are_accepted() -> Result<()> {
        let mut slugs = Vec::new();
        for entry in methods() {
            (entry.configure)(&(entry.defaults)())?;
            assert!(!slugs.contains(&entry.slug), "{} occurs twice", entry.slug);
            slugs.push(entry.slug);
        }
        Ok(())
    }

    #[cfg(feature = "text-pt")]
    #[test]
    fn an_unknown_method_is_an_error_with_a_way_out() {
        let message = |slug: &str| find(slug).map(|e| e.slug).unwrap_err().to_string();
        assert!(message("coopp").contains("did you mean `coop`"));
        assert!(message("xyzzy").contains("zeroshot, coop"));
    }
}
