//! Who takes part: every method of the registry as it is, and variants that are compared beside it.

use anyhow::{Context, Result, anyhow, bail};
use cliptune::method::{AnyMethod, Entry, lay_over};
use cliptune::{ImageNeeds, registry};
use serde_json::{Map, Value, json};

/// Most steps of a training on the built-in benchmark, so that all of it takes minutes.
const STEPS: usize = 600;

/// Most pictures that go through the image tower in a training of a method that learns there, forward and backward: each costs as
/// much as many class prompts.
const PICTURES: usize = 3200;

/// Fewest epochs on the built-in benchmark: the first warms up at a rate of 1e-5, so fewer would learn next to nothing.
const EPOCHS: usize = 4;

/// Methods whose authors train on whole training sets rather than a few pictures of each class.
const SUPERVISED: &[&str] = &["vp"];

/// Passes over the training pictures on the built-in benchmark: the method's own number, or CoOp's by shots (Sec. 4.1), as far
/// as [`STEPS`] allows, and [`PICTURES`] for a method that reads pixels.
fn epochs(drawn: Drawn, batch_size: usize, own: Option<usize>, needs: ImageNeeds) -> usize {
    let papers = own.unwrap_or(match drawn.shots {
        0..=1 => 50,
        2..=4 => 100,
        _ => 200,
    });
    let pictures = drawn.shots * drawn.n_cls;
    let steps = (pictures / batch_size.max(1)).max(1);
    let mut most = STEPS / steps;
    if needs == ImageNeeds::Pixels {
        most = most.min(PICTURES / pictures.max(1));
    }
    papers.min(most.max(EPOCHS))
}

/// What a built-in task is learned from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    pub(crate) shots: usize,
    pub(crate) n_cls: usize,
}

/// A method with settings that differ from its defaults.
struct Variant {
    /// The method it belongs to.
    method: &'static str,
    /// Ending of its slug and of its name.
    suffix: &'static str,
    name: &'static str,
    settings: fn() -> Value,
    /// Whether what it learns serves classes that it was not trained on.
    serves_new_classes: bool,
}

const VARIANTS: &[Variant] = &[
    Variant {
        method: "coop",
        suffix: "-class-specific",
        name: " (class-specific)",
        // 4 tokens for each class are 4 times cheaper than the 16 of the shared context, and as many as the paper's smaller M.
        settings: || json!({"class_specific": true, "n_ctx": 4}),
        serves_new_classes: false,
    },
    // Deep language prompting, MaPLe's other baseline. The image tower is frozen, so pictures are seen as CoOp sees them.
    Variant {
        method: "ivlp",
        suffix: "-language",
        name: " (language)",
        settings: || {
            json!({
                "n_ctx_text": 4, "n_ctx_vision": 0, "prompt_depth_vision": 0,
                "train": {"lr": 0.0025, "augment": "none"},
            })
        },
        serves_new_classes: true,
    },
];

/// A method as it takes part.
#[derive(Clone, Debug)]
pub(crate) struct Contestant {
    /// Its name in folders.
    pub(crate) slug: String,
    /// Its name in tables.
    pub(crate) label: String,
    pub(crate) entry: Entry,
    /// Whether it can be measured on classes that it was not trained on.
    pub(crate) serves_new_classes: bool,
    /// All settings, defaults included.
    config: Value,
    /// Whether the caller said how many epochs to train.
    epochs_are_set: bool,
}

impl Contestant {
    /// Whether nothing is learned, so that neither shots nor seed matter.
    pub(crate) fn is_fixed(&self) -> bool {
        self.entry.learns == "nothing"
    }

    /// Whether it takes part where all training pictures are shown.
    pub(crate) fn is_supervised(&self) -> bool {
        SUPERVISED.contains(&self.entry.slug)
    }

    /// Whether it takes part where other tasks are learned first: what can be told of tasks.
    pub(crate) fn is_multi_task(&self) -> bool {
        self.config.get("tasks").is_some()
    }

    /// All settings for a task whose hand-written sentence is `template`; `drawn` for a built-in one.
    pub(crate) fn config(&self, template: &str, drawn: Option<Drawn>) -> Result<Value> {
        let mut config = self.config.clone();
        if let (Some(drawn), false, Some(Value::Object(train))) =
            (drawn, self.epochs_are_set, config.get_mut("train"))
        {
            let number = |key: &str| Some(train.get(key)?.as_u64()? as usize);
            let batch_size = number("batch_size").unwrap_or(1);
            let epochs = epochs(drawn, batch_size, number("epochs"), self.entry.needs);
            train.insert("epochs".into(), json!(epochs));
        }
        if self.is_fixed()
            && let Some(templates) = config.get_mut("templates")
            && *templates == json!([])
        {
            *templates = json!([template]);
        }
        // What a method holds on to while it learns is the sentence that it is compared with.
        let names_data = config.get("dataset").is_some_and(|name| !name.is_null());
        if let Some(sentence) = config.get_mut("template")
            && sentence.is_null()
            && !names_data
        {
            *sentence = json!(template);
        }
        // A sentence with the name in its middle has no words for a context to begin with.
        if !template.ends_with(" {}.")
            && !names_data
            && let Some(begins_with_words) = config.get_mut("ctx_init")
            && *begins_with_words == json!(true)
        {
            *begins_with_words = json!(false);
        }
        Ok(self.configured(&config)?.config())
    }

    fn configured(&self, config: &Value) -> Result<Box<dyn AnyMethod>> {
        (self.entry.configure)(config).with_context(|| format!("settings of {}", self.label))
    }
}

/// The contestants that `chosen` names (method or contestant; all if it is empty), with `settings` on top.
///
/// # Errors
/// An unknown name, with the nearest; a setting that no contestant has.
pub(crate) fn choose(chosen: &[String], settings: &[Setting]) -> Result<Vec<Contestant>> {
    let mut all: Vec<Contestant> = registry::methods()
        .into_iter()
        .flat_map(variants_of)
        .collect();
    for name in chosen {
        if !all.iter().any(|contestant| is_called(contestant, name)) {
            let slugs = all.iter().map(|contestant| contestant.slug.as_str());
            bail!("--methods {name}: {}", unknown("method", name, slugs));
        }
    }
    all.retain(|contestant| {
        chosen.is_empty() || chosen.iter().any(|name| is_called(contestant, name))
    });
    for setting in settings {
        setting.apply(&mut all)?;
    }
    for contestant in &all {
        contestant.configured(&contestant.config)?;
    }
    Ok(all)
}

fn is_called(contestant: &Contestant, name: &str) -> bool {
    contestant.slug == name || contestant.entry.slug == name
}

/// The method with its defaults, then its variants.
fn variants_of(entry: Entry) -> Vec<Contestant> {
    let config = (entry.defaults)();
    let plain = Contestant {
        slug: entry.slug.to_owned(),
        label: entry.name.to_owned(),
        entry,
        serves_new_classes: true,
        config,
        epochs_are_set: false,
    };
    let variants = VARIANTS
        .iter()
        .filter(|variant| variant.method == entry.slug);
    let variants: Vec<Contestant> = variants
        .map(|variant| {
            let mut contestant = plain.clone();
            contestant.slug.push_str(variant.suffix);
            contestant.label.push_str(variant.name);
            contestant.serves_new_classes = variant.serves_new_classes;
            lay_over(&mut contestant.config, &(variant.settings)());
            contestant
        })
        .collect();
    std::iter::once(plain).chain(variants).collect()
}

/// "no such method; did you mean ..." or the list of what there is.
pub(crate) fn unknown<'a>(
    what: &str,
    found: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> String {
    match registry::closest(found, known.clone()) {
        Some(meant) => format!("no such {what}; did you mean `{meant}`?"),
        None => {
            let all: Vec<&str> = known.collect();
            format!("no such {what}; there are {}", all.join(", "))
        }
    }
}

/// `--set KEY=VALUE`: reaches every contestant that has the setting.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    text: String,
    path: Vec<String>,
    value: Value,
}

impl Setting {
    /// The value is JSON; what is no JSON is taken as a word.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let parts = text.split_once('=').map(|(k, v)| (k.trim(), v.trim()));
        let Some((key, value)) = parts.filter(|(k, v)| !k.is_empty() && !v.is_empty()) else {
            bail!("--set {text}: expected KEY=VALUE, for example --set train.epochs=50");
        };
        Ok(Self {
            text: text.to_owned(),
            path: key.split('.').map(str::to_owned).collect(),
            value: serde_json::from_str(value).unwrap_or_else(|_| Value::from(value)),
        })
    }

    fn apply(&self, contestants: &mut [Contestant]) -> Result<()> {
        let mut known = Vec::new();
        let mut reached = false;
        for contestant in contestants {
            known.extend(keys(&contestant.config, ""));
            if let Some(place) = at_mut(&mut contestant.config, &self.path) {
                *place = self.value.clone();
                reached = true;
                contestant.epochs_are_set |= self.path == ["train", "epochs"];
            }
        }
        if reached {
            return Ok(());
        }
        known.sort_unstable();
        known.dedup();
        let known = known.iter().map(String::as_str);
        Err(anyhow!(
            "--set {}: {}",
            self.text,
            unknown("setting", &self.path.join("."), known)
        ))
    }
}

fn at_mut<'a>(config: &'a mut Value, path: &[String]) -> Option<&'a mut Value> {
    path.iter()
        .try_fold(config, |place, key| place.get_mut(key.as_str()))
}

/// Names of all settings below `config`, tables included.
fn keys(config: &Value, prefix: &str) -> Vec<String> {
    let empty = Map::new();
    let table = config.as_object().unwrap_or(&empty);
    let each = |(key, value): (&String, &Value)| {
        let name = format!("{prefix}{key}");
        let mut names = keys(value, &format!("{name}."));
        names.insert(0, name);
        names
    };
    table.iter().flat_map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(chosen: &[&str], sets: &[&str]) -> String {
        let chosen: Vec<String> = chosen.iter().map(|name| (*name).to_owned()).collect();
        let settings = sets
            .iter()
            .map(|set| Setting::parse(set))
            .collect::<Result<Vec<_>>>();
        settings
            .and_then(|settings| choose(&chosen, &settings))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn every_method_takes_part_and_some_twice() -> Result<()> {
        let all = choose(&[], &[])?;
        let slugs: Vec<&str> = all.iter().map(|c| c.slug.as_str()).collect();
        for entry in registry::methods() {
            assert!(slugs.contains(&entry.slug), "{}", entry.slug);
        }
        assert!(slugs.contains(&"coop-class-specific"));
        assert_eq!(choose(&["coop".into()], &[])?.len(), 2);
        assert_eq!(choose(&["coop-class-specific".into()], &[])?.len(), 1);
        // A variant's settings leave the others as they are.
        let language = &choose(&["ivlp-language".into()], &[])?[0];
        let (plain, own) = ((language.entry.defaults)(), &language.config);
        assert_eq!(own["prompt_depth_vision"], json!(0));
        assert_eq!(own["train"]["lr"], json!(0.0025));
        assert_eq!(own["train"]["epochs"], plain["train"]["epochs"]);
        assert_eq!(own["prompt_depth_text"], plain["prompt_depth_text"]);
        Ok(())
    }

    #[test]
    fn every_contestant_can_learn_every_task() -> Result<()> {
        let drawn = Drawn {
            shots: 16,
            n_cls: 10,
        };
        for contestant in choose(&[], &[])? {
            for task in crate::reproduce::builtin::tasks() {
                let config = contestant.config(&task.template, Some(drawn));
                let config = config.with_context(|| task.slug.clone())?;
                if contestant.slug == "prograd" {
                    let ends = task.template.ends_with(" {}.");
                    assert_eq!(config["ctx_init"], json!(ends), "{}", task.template);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn epochs_are_the_papers_as_far_as_time_allows() {
        let features = ImageNeeds::GlobalFeatures;
        let of = |shots, n_cls| epochs(Drawn { shots, n_cls }, 32, None, features);
        assert_eq!([of(1, 10), of(4, 10), of(8, 10)], [50, 100, 200]);
        assert_eq!([of(16, 10), of(16, 36)], [120, 33]);
        let one_by_one = |shots| epochs(Drawn { shots, n_cls: 10 }, 1, Some(10), features);
        assert_eq!([one_by_one(1), one_by_one(8), one_by_one(16)], [10, 7, 4]);
        let in_pixels = |batch, own| {
            let drawn = Drawn {
                shots: 16,
                n_cls: 10,
            };
            epochs(drawn, batch, Some(own), ImageNeeds::Pixels)
        };
        assert_eq!([in_pixels(4, 5), in_pixels(256, 1000)], [5, 20]);
    }

    #[test]
    fn settings_reach_those_who_have_them() -> Result<()> {
        let settings = [
            Setting::parse("train.epochs=7")?,
            Setting::parse("n_ctx = 4")?,
        ];
        for contestant in choose(&[], &settings)? {
            let drawn = Drawn {
                shots: 16,
                n_cls: 10,
            };
            let config = contestant.config("a {}.", Some(drawn))?;
            match contestant.slug.as_str() {
                "zeroshot" => assert_eq!(config["templates"], json!(["a {}."])),
                "kgcoop" => assert_eq!(config["template"], json!("a {}.")),
                "coop" => assert_eq!(
                    (&config["train"]["epochs"], &config["n_ctx"]),
                    (&json!(7), &json!(4))
                ),
                _ => {}
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_unknown_is_refused_with_the_nearest_name() {
        assert!(message(&["coopp"], &[]).contains("did you mean `coop`?"));
        assert!(message(&["xyzzy"], &[]).contains("zeroshot, coop"));
        assert!(message(&[], &["train.epoch=3"]).contains("did you mean `train.epochs`?"));
        assert!(message(&[], &["n_ctx"]).contains("KEY=VALUE"));
        assert!(message(&[], &["n_ctx=0"]).contains("CoOp"));
    }
}
