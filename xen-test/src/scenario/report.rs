//! What is shown and kept of a failure.

use std::path::Path;

use crate::pair::Pair;
use crate::progress;

/// Lines shown of each log.
const TAIL: usize = 30;

/// Collects both hosts' logs below `logs`, prints the tails and says where the rest is. Never
/// fails: what cannot be had is said.
pub fn failure(pair: &Pair, logs: &Path) {
    for host in pair.hosts() {
        if let Err(error) = host.collect_logs(logs) {
            progress!("no logs from inside host {}: {error:#}", host.name());
        }
        let console = host.machine().console();
        let copy = logs.join(format!("{}-console.log", host.name()));
        if let Err(error) = std::fs::copy(&console, &copy) {
            progress!("no console log of host {}: {error}", host.name());
        }
    }
    let mut files = Vec::new();
    find_logs(logs, &mut files);
    files.sort();
    for file in &files {
        show_tail(file);
    }
    eprintln!("full logs: {}", logs.display());
}

/// Logs worth a look at the terminal: consoles, xl's, remusd's.
fn find_logs(dir: &Path, files: &mut Vec<std::path::PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            find_logs(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let noise = [
                "dpkg.log",
                "alternatives.log",
                "bootstrap.log",
                "term.log",
                "history.log",
                // In the console log as well.
                "hypervisor.log",
                "xenstored-access.log",
            ];
            if !noise.iter().any(|name| path.ends_with(name)) {
                files.push(path);
            }
        }
    }
}

fn show_tail(file: &Path) {
    let Ok(text) = std::fs::read(file) else { return };
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    if lines.is_empty() {
        return;
    }
    eprintln!("--- {} (last {} of {} lines)", file.display(), TAIL.min(lines.len()), lines.len());
    for line in &lines[lines.len().saturating_sub(TAIL)..] {
        eprintln!("    {line}");
    }
}
