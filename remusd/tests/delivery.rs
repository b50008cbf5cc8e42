//! What is delivered besides the programs: the manual's links and commands, alert rules by promtool, the Debian package by dpkg-deb and lintian, scripts by `sh -n`. A tool that is not there is a check that is skipped, and counted as such in the last line, which
//! xen-test/check reads.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;

enum Done {
    Passed,
    Skipped(&'static str),
}

type Check = fn(&Path) -> Result<Done, String>;

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("remusd is in the workspace").to_owned();
    let checks: [(&str, Check); 5] = [
        ("links", links),
        ("commands", commands),
        ("alert rules", rules),
        ("shell scripts", scripts),
        ("package", package),
    ];
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, check) in checks {
        match check(&root) {
            Ok(Done::Passed) => {
                passed += 1;
                println!("{name}: ok");
            }
            Ok(Done::Skipped(why)) => {
                skipped += 1;
                println!("{name}: skipped: {why}");
            }
            Err(text) => {
                failed += 1;
                println!("{name}: FAILED: {text}");
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    ExitCode::from(u8::from(failed > 0))
}

fn there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Runs a program to its end; its output, or what went wrong.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(text),
        false => Err(format!("{command:?}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr))),
    }
}

/// The manual: README, CONTRIBUTING, CHANGELOG and docs.
fn manual(root: &Path) -> Result<Vec<(PathBuf, String)>, String> {
    let mut files = vec![root.join("README.md"), root.join("CONTRIBUTING.md"), root.join("CHANGELOG.md")];
    for entry in std::fs::read_dir(root.join("docs")).map_err(|error| error.to_string())? {
        let path = entry.map_err(|error| error.to_string())?.path();
        if path.extension().is_some_and(|end| end == "md") {
            files.push(path);
        }
    }
    let read = |path: PathBuf| match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(error) => Err(format!("{}: {error}", path.display())),
    };
    files.into_iter().map(read).collect()
}

/// A heading as GitHub links to it.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// Every relative link leads to a file that is there, and to a heading in it.
fn links(root: &Path) -> Result<Done, String> {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (path, text) in manual(root)? {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.contains("://") || link.contains(' ') {
                continue;
            }
            count += 1;
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name("").join(file) };
            let found = std::fs::read_to_string(&target).ok();
            let there = target.exists()
                && (heading.is_empty()
                    || found.is_some_and(|t| t.lines().any(|line| line.starts_with('#') && anchor(line) == heading)));
            if !there {
                wrong.push(format!("{}: {link}", path.display()));
            }
        }
    }
    match wrong.is_empty() {
        true if count > 50 => Ok(Done::Passed),
        true => Err(format!("only {count} links found")),
        false => Err(wrong.join("\n")),
    }
}

/// Every `remus` and `remusd` command of the manual's examples can be typed.
fn commands(root: &Path) -> Result<Done, String> {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (path, text) in manual(root)? {
        for line in text.lines().filter(|line| line.starts_with("    ") || line.contains("# remus ")) {
            let line = line.trim();
            // Up to the explanation, and behind the prompt.
            let typed =
                line.split_once("# ").map_or(line, |(prompt, typed)| if prompt.contains(' ') { line } else { typed });
            let typed = typed.split("  ").next().unwrap_or_default().split(" #").next().unwrap_or_default();
            let words: Vec<_> = typed.split_whitespace().collect();
            if typed.contains(['…', '|', '>', ';', '[', '"']) {
                continue;
            }
            let parsed = match words.first() {
                Some(&"remus") => remusd::cli::Args::try_parse_from(&words).map(drop),
                Some(&"remusd") => remusd::cli::daemon::Args::try_parse_from(&words).map(drop),
                _ => continue,
            };
            count += 1;
            if let Err(error) = parsed {
                wrong.push(format!(
                    "{}: {typed}: {}",
                    path.display(),
                    error.to_string().lines().next().unwrap_or_default()
                ));
            }
        }
    }
    match wrong.is_empty() {
        true if count > 40 => Ok(Done::Passed),
        true => Err(format!("only {count} commands found")),
        false => Err(wrong.join("\n")),
    }
}

fn rules(root: &Path) -> Result<Done, String> {
    if !there("promtool") {
        return Ok(Done::Skipped("no promtool (Debian's package prometheus)"));
    }
    let folder = root.join("scripts/monitoring");
    run(Command::new("promtool").current_dir(&folder).args(["check", "rules", "remus.rules.yml"]))?;
    run(Command::new("promtool").current_dir(&folder).args(["test", "rules", "remus.rules.test.yml"]))?;
    Ok(Done::Passed)
}

fn scripts(root: &Path) -> Result<Done, String> {
    let mut count = 0;
    for folder in ["scripts", "scripts/debian", "scripts/witness"] {
        for entry in std::fs::read_dir(root.join(folder)).map_err(|error| error.to_string())? {
            let path = entry.map_err(|error| error.to_string())?.path();
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let Some(shell) = ["sh", "bash"].into_iter().find(|shell| text.starts_with(&format!("#!/bin/{shell}\n")))
            else {
                continue;
            };
            run(Command::new(shell).arg("-n").arg(&path))?;
            count += 1;
        }
    }
    if count < 6 { Err(format!("only {count} scripts found")) } else { Ok(Done::Passed) }
}

/// Files that have to be in the package, and what has to be in them.
const CONTENTS: &[(&str, &str)] = &[
    ("usr/sbin/remusd", ""),
    ("usr/sbin/remus", ""),
    ("usr/sbin/remus-disk", ""),
    ("usr/sbin/xl-remus", "xl remus"),
    ("usr/lib/remus/block-drbd-probe", ""),
    ("usr/lib/remus/drbd-checkpoint", "DRBD"),
    ("usr/lib/remus/event-webhook", "REMUS_WEBHOOK_URL"),
    ("usr/lib/ocf/resource.d/remus/remus", "meta-data"),
    ("usr/share/remusd/witness/fence-agent", ""),
    ("usr/share/remusd/monitoring/remus.rules.yml", "RemusUnprotected"),
    ("usr/share/remusd/monitoring/remus.dashboard.json", ""),
    ("etc/remus/remusd.toml", "#= port = 7368"),
    ("lib/systemd/system/remusd.service", "Type=notify"),
    ("lib/systemd/system/remusd-stop.service", "After=remusd.service xendomains.service"),
    ("lib/systemd/system/remus-disk@.service", ""),
    ("usr/lib/tmpfiles.d/remusd.conf", "/run/remus"),
    ("usr/lib/modules-load.d/remusd.conf", "sch_plug"),
    ("usr/share/man/man8/remusd.8.gz", ""),
    ("usr/share/man/man8/remus-protect.8.gz", ""),
    ("usr/share/man/man5/remusd.toml.5.gz", ""),
    ("usr/share/bash-completion/completions/remus", "switchover"),
    ("usr/share/zsh/vendor-completions/_remus", "switchover"),
    ("usr/share/fish/vendor_completions.d/remus.fish", "switchover"),
    ("usr/share/doc/remusd/copyright", ""),
];

fn package(root: &Path) -> Result<Done, String> {
    if !cfg!(feature = "xen") {
        return Ok(Done::Skipped("built without Xen's headers, and the package is not"));
    }
    for (program, why) in [
        ("cargo-deb", "no cargo-deb (cargo install cargo-deb)"),
        ("dpkg-deb", "no dpkg-deb"),
        ("dpkg-shlibdeps", "no dpkg-dev"),
    ] {
        if !there(program) {
            return Ok(Done::Skipped(why));
        }
    }
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let out = dir.path().join("remusd.deb");
    run(Command::new(root.join("scripts/package")).env("PROFILE", "dev").arg("--output").arg(&out))?;
    let unpacked = dir.path().join("unpacked");
    run(Command::new("dpkg-deb").arg("-R").args([&out, &unpacked]))?;
    for (path, words) in CONTENTS {
        let bytes = std::fs::read(unpacked.join(path)).map_err(|error| format!("{path}: {error}"))?;
        if !String::from_utf8_lossy(&bytes).contains(words) {
            return Err(format!("{path} does not say {words:?}"));
        }
    }
    let control = |name: &str| {
        std::fs::read_to_string(unpacked.join("DEBIAN").join(name)).map_err(|error| format!("DEBIAN/{name}: {error}"))
    };
    for (file, words) in [
        ("control", "Package: remusd"),
        ("control", "xen-utils-common"),
        ("control", "libc6"),
        ("conffiles", "/etc/remus/remusd.toml"),
        ("postinst", "guests are protected"),
        ("prerm", "disable --now"),
        ("postrm", "purge"),
    ] {
        if !control(file)?.contains(words) {
            return Err(format!("DEBIAN/{file} does not say {words:?}"));
        }
    }
    works(&unpacked)?;
    lint(&out)
}

/// The programs run from where they are installed, and find the configuration in order.
fn works(unpacked: &Path) -> Result<(), String> {
    let at = |path: &str| -> PathBuf { unpacked.join(path) };
    let checked = run(Command::new(at("usr/sbin/remusd"))
        .arg("check-config")
        .arg("--config")
        .arg(at("etc/remus/remusd.toml"))
        .arg("--policies")
        .arg(at("etc/remus/domains")))?;
    if !checked.contains("listen.port = 7368") {
        return Err(format!("check-config says {checked}"));
    }
    for program in ["usr/sbin/remus", "usr/sbin/remus-disk"] {
        run(Command::new(at(program)).arg("--version"))?;
    }
    if there("systemd-analyze") {
        for unit in ["remusd.service", "remusd-stop.service"] {
            // The programs that a unit names are looked for in the machine's own tree, where they need not be.
            let mut command = Command::new("systemd-analyze");
            command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(at("lib/systemd/system").join(unit));
            let output = command.output().map_err(|error| error.to_string())?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let ours = |line: &&str| line.contains(unit) && !line.contains("is not executable");
            if let Some(line) = text.lines().find(ours) {
                return Err(line.to_owned());
            }
        }
    }
    Ok(())
}

/// What lintian finds that is not about a debug build or about how the archive wants to be built.
fn lint(package: &Path) -> Result<Done, String> {
    if !there("lintian") {
        println!("package: without lintian, which is not here");
        return Ok(Done::Passed);
    }
    let tolerated = [
        // Not from the archive: no bug closed, no source package, a build that is not stripped.
        "initial-upload-closes-no-bugs",
        "unstripped-binary-or-object",
        "no-changelog",
        "debian-changelog-file-missing",
        // remus-disk is started by its service and by remus alone.
        "no-manual-page",
        "extended-description-line-too-long",
        "maintainer-script-calls-systemctl",
    ];
    let output = Command::new("lintian")
        .args(["--allow-root", "--fail-on", "none", "--tag-display-limit", "0"])
        .arg(package)
        .output();
    let output = output.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong: Vec<_> =
        text.lines().filter(|line| line.starts_with("E:") && !tolerated.iter().any(|tag| line.contains(tag))).collect();
    if wrong.is_empty() { Ok(Done::Passed) } else { Err(wrong.join("\n")) }
}
