//! Reports for people.

use super::{Finding, Report, Verdict};
use crate::cli::render::Paint;

fn line(finding: &Finding, paint: Paint) -> String {
    let (word, colour) = match finding.verdict {
        Verdict::Ok => ("ok", 32),
        Verdict::Warn => ("WARN", 33),
        Verdict::Fail => ("FAIL", 31),
    };
    // Padded before it is painted: colours have no width.
    let word = paint.with(&format!("{word:4}"), colour);
    let todo = finding.todo.as_ref().map_or(String::new(), |todo| format!("\n        -> {todo}"));
    format!("  {word}  {}: {}{todo}", finding.check, finding.found)
}

/// Each host's findings, its guests', and what the two hosts must agree in.
#[must_use]
pub fn text(reports: &[Report], between: &[Finding], paint: Paint) -> String {
    let mut out = Vec::new();
    for report in reports {
        out.push(format!("{}:", report.host));
        out.extend(report.findings.iter().map(|finding| line(finding, paint)));
        for guest in &report.guests {
            out.push(format!("{}, guest {}:", report.host, guest.name));
            out.extend(guest.findings.iter().map(|finding| line(finding, paint)));
        }
    }
    if !between.is_empty() {
        out.push("between them:".into());
        out.extend(between.iter().map(|finding| line(finding, paint)));
    }
    out.join("\n")
}
