//! What a method learned to add to every picture.

use std::path::Path;

use super::details::picture;
use super::html::escape;
use super::words::title;
use crate::reproduce::added::of_run;
use crate::reproduce::record::{Protocol, count};
use crate::reproduce::summary::Results;

/// For each task and each contestant that adds something: what that is, and a test picture with it.
pub(super) fn added(results: &Results, out: &Path) -> String {
    let mut html = String::new();
    let taught = [Protocol::FewShot, Protocol::Supervised]
        .into_iter()
        .flat_map(|protocol| {
            results
                .tasks(protocol)
                .into_iter()
                .map(move |task| (protocol, task))
        });
    for (protocol, task) in taught {
        for who in results.who(protocol, task) {
            let run = results.best_taught(protocol, task, &who).next();
            let Some(run) = run.map(|record| &record.run) else {
                continue;
            };
            let Some([alone, on_a_picture]) = of_run(out, &run.folder()) else {
                continue;
            };
            let name = format!("{}, {}", who.label, count(run.shots, "shot"));
            html.push_str(&format!(
                "<h3>{}: {}</h3>\n<ul class=\"pictures\"><li>{}<div class=\"true\">what is added</div></li><li>{}<div class=\"true\">a test picture with it</div></li></ul>\n",
                escape(title(results, task)),
                escape(&name),
                picture(out, &alone, &format!("What {name} adds to every picture")),
                picture(out, &on_a_picture, &format!("A test picture with what {name} adds")),
            ));
        }
    }
    match html.is_empty() {
        true => html,
        false => format!(
            "<p>Learned pixels, enlarged, of the first seed at the largest number of shots. Where nothing is added it is grey; what would be darker than black or lighter than white is cut here, CLIP sees it as it is.</p>\n{html}"
        ),
    }
}
