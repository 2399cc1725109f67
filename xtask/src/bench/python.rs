//! Finding a Python with PyTorch, or making one.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::out;

/// Names a Python with PyTorch, as `--python` does.
pub(super) const VARIABLE: &str = "CLIPTUNE_BENCH_PYTHON";

/// The Python that was named, else one of a virtual environment in `folder`, made if it is not there.
pub(super) fn find(named: Option<&Path>, folder: &Path) -> Result<PathBuf> {
    let variable = std::env::var_os(VARIABLE).map(PathBuf::from);
    if let Some(python) = named.map(Path::to_owned).or(variable) {
        if !has_torch(&python) {
            bail!(
                "{} cannot import torch; install it there, or name no Python and let this command make a virtual environment",
                python.display()
            );
        }
        return Ok(python);
    }
    let environment = folder.join("python");
    let python = environment.join("bin/python");
    if !has_torch(&python) {
        out::error(&format!(
            "PyTorch is installed into {} (once, some gigabytes; --python or {VARIABLE} names a Python that has it)",
            environment.display()
        ));
        run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&environment))?;
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "torch"]))?;
        if !has_torch(&python) {
            bail!(
                "{} cannot import torch after its installation",
                python.display()
            );
        }
    }
    Ok(python)
}

fn has_torch(python: &Path) -> bool {
    let mut command = Command::new(python);
    command.args(["-c", "import torch"]);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> Result<()> {
    // Standard output is for the tables.
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command
        .status()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}; --python names a Python that has PyTorch");
    }
    Ok(())
}
