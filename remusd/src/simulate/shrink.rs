//! Makes a failing plan small: what is not needed for the violation is left out.

use super::oracle::Rule;
use super::plan::Plan;
use super::run;

fn breaks(plan: &Plan, rule: Rule) -> bool {
    run(plan).oracle.violation.is_some_and(|violation| violation.rule == rule)
}

/// The smallest plan found that breaks the same rule: without faults that do not matter, and without small random delays if they do
/// not matter either.
#[must_use]
pub fn shrink(plan: &Plan, rule: Rule) -> Plan {
    let mut best = plan.clone();
    let mut size = best.faults.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < best.faults.len() {
            let mut less = best.clone();
            less.faults.drain(at..(at + size).min(best.faults.len()));
            if breaks(&less, rule) {
                best = less;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    let even = Plan { noise: None, ..best.clone() };
    if breaks(&even, rule) {
        best = even;
    } else if let Some(noise) = (0..64).find(|noise| breaks(&Plan { noise: Some(*noise), ..best.clone() }, rule)) {
        best.noise = Some(noise);
    }
    best
}
