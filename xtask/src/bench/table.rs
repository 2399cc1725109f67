//! A row as a table, for the terminal and for a page.

use super::record::{Measured, Results, RowRecord};
use super::rows::Contender;
use super::summary::Spread;

/// A line: what it says and one cell for each contender.
type Line = (String, Vec<String>);

/// The row for a terminal.
pub(super) fn text(row: &RowRecord) -> String {
    let mut lines = vec![(String::new(), titles(row))];
    lines.extend(lines_of(row));
    let width = |cells: &mut dyn Iterator<Item = &String>| {
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let first = width(&mut lines.iter().map(|line| &line.0));
    let columns: Vec<usize> = (0..row.contenders.len())
        .map(|i| width(&mut lines.iter().map(|line| &line.1[i])))
        .collect();
    let mut out = format!("{}: {}\n", row.row, row.title);
    for (label, cells) in &lines {
        out += &format!("  {label:<first$}");
        for (cell, width) in cells.iter().zip(&columns) {
            out += &format!("  {cell:>width$}");
        }
        out = out.trim_end().to_owned() + "\n";
    }
    for note in notes(row) {
        out += &format!("  {note}\n");
    }
    out
}

/// How much more a step of CoOp adds with 1,000 classes than with 100, once both were measured.
pub(super) fn growth(results: &Results) -> Option<String> {
    let row = |name: &str| results.rows.iter().find(|row| row.row == name);
    let (few, many) = (row("coop-100")?, row("coop-1000")?);
    let line = |contender: Contender| {
        let (few, many) = (few.of(contender)?.growth, many.of(contender)?.growth);
        Some(format!(
            "{}: a step adds {} with 100 classes and {} with 1,000, {:.2} times as much",
            contender.title(),
            bytes(few),
            bytes(many),
            many as f64 / few as f64
        ))
    };
    let ours = [Contender::Ours, Contender::OursTwice];
    let lines: Vec<String> = ours.into_iter().filter_map(line).collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// All rows as a page of Markdown.
pub(super) fn page(results: &Results) -> String {
    let machine = &results.machine;
    let mut out = format!(
        "# Steps against PyTorch and candle, {}\n\n{}, {} cores, {}, {}. Random weights of published sizes that f16 represents exactly; everybody computes in f32, ours keeps matrices in 16 bits. \
         Times and ratios: median (smallest–largest) of interleaved rounds; a ratio is that of the same round. \
         Memory: most of the process's resident memory.\n",
        results.date,
        machine.cpu,
        machine.cores,
        bytes(machine.memory_bytes),
        machine.system
    );
    for row in &results.rows {
        out += &format!("\n## {}: {}\n\n{}\n\n", row.row, row.title, row.note);
        out += &format!("| | {} |\n", titles(row).join(" | "));
        out += &format!("| --- |{}\n", " ---: |".repeat(row.contenders.len()));
        for (label, cells) in lines_of(row) {
            out += &format!("| {} | {} |\n", label.trim(), cells.join(" | "));
        }
        out.push('\n');
        for note in notes(row) {
            out += &format!("- {note}\n");
        }
        if let Some(growth) = growth(results).filter(|_| row.row == "coop-1000") {
            for line in growth.lines() {
                out += &format!("- {line}\n");
            }
        }
    }
    out
}

fn titles(row: &RowRecord) -> Vec<String> {
    let title = |m: &Measured| m.contender.title().to_owned();
    row.contenders.iter().map(title).collect()
}

fn lines_of(row: &RowRecord) -> Vec<Line> {
    let line = |label: &str, cell: &dyn Fn(&Measured) -> Option<String>| -> Option<Line> {
        let cells: Vec<_> = row.contenders.iter().map(cell).collect();
        // A line that nobody has anything to say on is left out.
        cells.iter().any(Option::is_some).then(|| {
            let cells = cells.into_iter().map(|cell| cell.unwrap_or_default());
            (label.to_owned(), cells.collect())
        })
    };
    let ours: Vec<&Measured> = [Contender::Ours, Contender::OursTwice]
        .into_iter()
        .filter_map(|contender| row.of(contender))
        .collect();
    let mut lines = vec![
        line("wall time", &|m| m.wall().map(seconds)),
        line("CPU time", &|m| m.cpu().map(seconds)),
    ];
    for us in &ours {
        let title = us.contender.title();
        let other = |m: &Measured| m.contender != us.contender;
        let scale = |m: &Measured| m.scale as f64 / us.scale as f64;
        lines.push(line(&format!("wall time / {title}"), &|m| {
            let ratio = Spread::of_ratios(&m.wall, &us.wall).filter(|_| other(m))?;
            Some(factor(ratio.map(|x| x * scale(m))))
        }));
        lines.push(line(&format!("CPU time / {title}"), &|m| {
            let ratio = Spread::of_ratios(&m.cpu, &us.cpu).filter(|_| other(m))?;
            Some(factor(ratio.map(|x| x * scale(m))))
        }));
    }
    lines.push(line("peak memory", &|m| Some(bytes(m.peak()))));
    lines.push(line("before the first step", &|m| Some(bytes(m.base))));
    lines.push(line("a step adds", &|m| Some(bytes(m.growth))));
    lines.push(line("  forecast", &|m| {
        let forecast = m.forecast?;
        let off = 100.0 * (forecast as f64 / m.growth as f64 - 1.0);
        Some(format!("{} ({off:+.0} %)", bytes(forecast)))
    }));
    lines.push(line("in one graph, by first growth", &|m| {
        m.one_graph().map(bytes)
    }));
    for us in &ours {
        let title = us.contender.title();
        let against = |label: &str, theirs: &dyn Fn(&Measured) -> Option<u64>, ours: u64| {
            line(&format!("{label} / {title}"), &|m| {
                let theirs = theirs(m).filter(|_| m.contender != us.contender)?;
                Some(format!("{:.1}", theirs as f64 / ours as f64))
            })
        };
        lines.push(against("peak memory", &|m| Some(m.peak()), us.peak()));
        lines.push(against("a step adds", &|m| Some(m.growth), us.growth));
        lines.push(against("in one graph", &Measured::one_graph, us.peak()));
    }
    lines.push(line("largest difference", &|m| match m.worst() {
        Some((_, error)) => Some(format!("{error:.1e}")),
        None => (m.contender == row.reference).then(|| "reference".to_owned()),
    }));
    lines.into_iter().flatten().collect()
}

fn notes(row: &RowRecord) -> Vec<String> {
    let rounds = row.contenders.iter().map(|m| m.wall.len()).max();
    let mut versions: Vec<String> = Vec::new();
    for (name, version) in row.contenders.iter().flat_map(|m| &m.versions) {
        let version = format!("{name} {version}");
        if !versions.contains(&version) {
            versions.push(version);
        }
    }
    let mut notes = vec![format!(
        "rounds: {}, threads: {}, {}; `{}`",
        rounds.unwrap_or(0),
        row.threads,
        versions.join(", "),
        row.command
    )];
    let worst = row.contenders.iter().filter_map(|m| {
        let (name, _) = m.worst()?;
        Some(format!("{name} ({})", m.contender.title()))
    });
    let worst: Vec<String> = worst.collect();
    if !worst.is_empty() {
        notes.push(format!("largest difference in {}", worst.join(", ")));
    }
    for (contender, threads) in &row.same_bits {
        let threads: Vec<String> = threads.iter().map(usize::to_string).collect();
        notes.push(format!(
            "{contender}: results and gradients have the same bits with {} threads",
            threads.join(", ")
        ));
    }
    notes.extend(row.left_out.iter().cloned());
    let failures = row.failures.iter();
    notes.extend(failures.map(|failure| format!("FAILED: {failure}")));
    notes
}

fn seconds(spread: Spread) -> String {
    let digits = match spread.median {
        x if x < 1.0 => 3,
        x if x < 10.0 => 2,
        _ => 1,
    };
    let Spread { median, min, max } = spread;
    format!("{median:.digits$} s ({min:.digits$}–{max:.digits$})")
}

fn factor(spread: Spread) -> String {
    let digits = if spread.median < 10.0 { 2 } else { 1 };
    let Spread { median, min, max } = spread;
    format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
}

fn bytes(n: u64) -> String {
    match n as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n => format!("{:.0} MB", n / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::row;
    use super::*;

    #[test]
    fn a_table_says_times_ratios_and_memory() {
        let text = text(&row("coop-1000"));
        let squeezed: Vec<String> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        for expected in [
            "coop-1000: title of coop-1000",
            "PyTorch ours",
            "wall time 22.0 s (20.0–27.0) 1.00 s (0.90–1.10)",
            "wall time / ours 20.0 (20.0–30.0)",
            "CPU time / ours 20.0 (20.0–30.0)",
            "peak memory 4.60 GB 900 MB",
            "before the first step 500 MB 500 MB",
            "a step adds 4.10 GB 200 MB",
            "forecast 180 MB (-10 %)",
            "in one graph, by first growth 40.50 GB",
            "peak memory / ours 5.1",
            "a step adds / ours 20.5",
            "in one graph / ours 45.0",
            "largest difference reference 4.0e-6",
            "largest difference in grad.ctx (ours)",
            "ours: results and gradients have the same bits with 1, 2, 4 threads",
        ] {
            assert!(
                squeezed.iter().any(|line| line == expected),
                "no `{expected}` in\n{text}"
            );
        }
        assert!(!text.contains("two passes"), "{text}");
    }

    #[test]
    fn the_growth_with_the_classes_is_said_once_both_were_measured() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let mut results = Results::open(dir.path())?;
        results.add(row("coop-100"));
        assert_eq!(growth(&results), None);
        let mut many = row("coop-1000");
        let [_, ours] = many.contenders.as_mut_slice() else {
            panic!("two contenders");
        };
        ours.growth = 250_000_000;
        results.add(many);
        let expected =
            "ours: a step adds 200 MB with 100 classes and 250 MB with 1,000, 1.25 times as much";
        assert_eq!(growth(&results).as_deref(), Some(expected));
        assert!(page(&results).ends_with(&format!("- {expected}\n")));
        Ok(())
    }
}
