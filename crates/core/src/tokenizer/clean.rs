//! What the reference does to a text before it is split into words.

use super::{ftfy, html};

/// Cleans `text` as the reference does: repairs of broken encodings ([module documentation](super)), HTML character references
/// resolved twice, white space collapsed to single spaces and stripped, lower case.
pub fn clean(text: &str) -> String {
    let fixed = ftfy::fix_text(text);
    let once = html::unescape(&fixed);
    let twice = html::unescape(&once);
    let mut collapsed = String::with_capacity(twice.len());
    for word in twice.split_whitespace() {
        if !collapsed.is_empty() {
            collapsed.push(' ');
        }
        collapsed.push_str(word);
    }
    collapsed.to_lowercase()
}
