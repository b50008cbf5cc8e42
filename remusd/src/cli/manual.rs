//! Man pages, made from what can be typed and from the default configuration file, so that they cannot say anything else.

use std::io::Write;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, roman};

/// For administrators (man-pages(7)).
const SECTION: &str = "8";

/// Writes the pages of `remus` and each of its commands, of `remusd`, and of the configuration file. Returns how many.
///
/// # Errors
/// What the file system says.
pub fn write(folder: &Path) -> std::io::Result<usize> {
    std::fs::create_dir_all(folder)?;
    let mut count = 0;
    for command in [super::Args::command(), super::daemon::Args::command()] {
        let mut command = command.disable_help_subcommand(true);
        command.build();
        count += pages(&command, folder)?;
    }
    let mut file = std::fs::File::create(folder.join("remusd.toml.5"))?;
    configuration().to_writer(&mut file)?;
    file.flush()?;
    Ok(count + 1)
}

fn pages(command: &Command, folder: &Path) -> std::io::Result<usize> {
    let mut count = 0;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        count += pages(below, folder)?;
    }
    let source = format!("remusd {}", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone()).section(SECTION).source(source).manual("Remus").generate_to(folder)?;
    Ok(count + 1)
}

fn configuration() -> Roff {
    let text = include_str!("../../../scripts/remusd.toml");
    let mut page = Roff::new();
    page.control("TH", ["remusd.toml", "5", "", concat!("remusd ", env!("CARGO_PKG_VERSION")), "Remus"]);
    page.control("SH", ["NAME"]);
    page.text([roman("remusd.toml - settings of remusd")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman("The file as it is installed, with every setting, what it means and its default:")]);
    page.control("nf", []);
    let lines: Vec<Inline> = text.lines().flat_map(|line| [roman(line), Inline::LineBreak]).collect();
    page.text(lines);
    page.control("fi", []);
    page.control("SH", ["SEE ALSO"]);
    page.text([roman("remusd(8), remus(8), remus-enable(8)")]);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page without markup, as `man` shows it, if it can be shown here.
    fn shown(path: &Path) -> Option<String> {
        let output = std::process::Command::new("man")
            .args(["-l", "--warnings"])
            .arg(path)
            .env("MANWIDTH", "200")
            .output()
            .ok()?;
        assert!(output.stderr.is_empty(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn every_command_has_a_page_that_says_what_can_be_typed() {
        let dir = tempfile::tempdir().unwrap();
        let count = write(dir.path()).unwrap();
        let names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(names.len(), count);
        for wanted in [
            "remus.8",
            "remus-protect.8",
            "remus-enable.8",
            "remus-gate-install.8",
            "remusd.8",
            "remusd-check-config.8",
            "remusd.toml.5",
        ] {
            assert!(names.iter().any(|name| name == wanted), "{wanted}: {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("create-domain")), "what is hidden is");
        let page = std::fs::read_to_string(dir.path().join("remus-protect.8")).unwrap();
        assert!(page.contains("on\\-backup\\-loss"), "{page}");
        let configuration = std::fs::read_to_string(dir.path().join("remusd.toml.5")).unwrap();
        assert!(configuration.contains("[listen]") && configuration.contains("7368"), "{configuration}");
        match shown(&dir.path().join("remusd.toml.5")) {
            Some(text) => {
                assert!(text.contains("#= port = 7368\n"), "{text}");
                let text = shown(&dir.path().join("remus-enable.8")).unwrap();
                assert!(text.contains("--to <HOST>"), "{text}");
            }
            None => eprintln!("skipped: no man here"),
        }
    }
}
