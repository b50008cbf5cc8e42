//! The text against the format, and what is asked of it against what there is.

use std::collections::{BTreeMap, BTreeSet};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::ids::{Epoch, Generation, ProtectionId};

fn row(role: Role) -> StatusRow {
    StatusRow {
        domain: "web \"1\"\\".into(),
        uuid: ProtectionId::nil(),
        domid: None,
        role,
        peer: "hostb".into(),
        state: "protected".into(),
        protected: true,
        may_run: MayRun::Here,
        generation: Generation(7),
        acked: Some(Epoch(812)),
        acked_age_ms: Some(184),
        stale_ms: Some(200),
        held_packets: 12,
        held_bytes: 1800,
        dropped_packets: 3,
        last_epoch: None,
        interval: None,
        detail: String::new(),
    }
}

fn now() -> Now {
    Now {
        rows: vec![row(Role::Primary), StatusRow { domain: "db".into(), ..row(Role::Backup) }],
        sent: vec![("web \"1\"\\".into(), 100, 409_600)],
        witnesses: vec![("http://w:2379".into(), Some(true)), ("script:/w".into(), Some(false)), ("x".into(), None)],
        wanted: vec!["db".into()],
    }
}

fn report() -> EpochReport {
    EpochReport {
        armed: true,
        capture_us: 2000,
        resume_us: 1000,
        ack_us: 40_000,
        bytes: 5000,
        ..EpochReport::default()
    }
}

fn full() -> Metrics {
    let metrics = Metrics::new();
    metrics.epoch("web \"1\"\\", &report());
    metrics.event(EventKind::Unprotected);
    metrics
}

type Labels = BTreeMap<String, String>;

/// A reader of OpenMetrics 1.0, as strict as needed to notice what a scraper would refuse.
#[derive(Debug, Default)]
struct Parsed {
    kinds: BTreeMap<String, String>,
    samples: Vec<(String, Labels, f64)>,
}

impl Parsed {
    fn of(text: &str) -> Self {
        let mut parsed = Self::default();
        let mut helped = BTreeSet::new();
        let body = text.strip_suffix("# EOF\n").expect("ends with EOF");
        for line in body.lines() {
            if let Some(meta) = line.strip_prefix("# ") {
                let mut words = meta.splitn(3, ' ');
                let (what, name, rest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
                match what {
                    "HELP" => assert!(helped.insert(name.to_owned()), "{name} twice"),
                    "TYPE" => assert!(parsed.kinds.insert(name.into(), rest.into()).is_none(), "{name} twice"),
                    "UNIT" => assert!(name.ends_with(&format!("_{rest}")), "{line}"),
                    other => panic!("{other}"),
                }
                continue;
            }
            let (name, labels, value) = sample(line);
            let family = parsed.family(&name).unwrap_or_else(|| panic!("{name} belongs to no family"));
            assert!(helped.contains(&family), "{family} is not explained");
            parsed.samples.push((name, labels, value));
        }
        parsed
    }

    /// The family of a sample: by its name and the suffixes that the family's kind allows.
    fn family(&self, name: &str) -> Option<String> {
        self.kinds.iter().find_map(|(family, kind)| {
            let allowed: &[&str] = match kind.as_str() {
                "gauge" => &[""],
                "counter" => &["_total"],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count"],
                other => panic!("{other}"),
            };
            allowed.iter().any(|end| name.strip_suffix(end) == Some(family)).then(|| family.clone())
        })
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let found = |l: &Labels| labels.iter().all(|(key, value)| l.get(*key).is_some_and(|v| v == value));
        self.samples.iter().find(|(n, l, _)| n == name && found(l)).map(|(_, _, value)| *value)
    }
}

fn sample(line: &str) -> (String, Labels, f64) {
    let Some((name, rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ').unwrap();
        return (name.into(), Labels::new(), value.parse().unwrap());
    };
    let (mut labels, mut rest) = (Labels::new(), rest);
    loop {
        let (key, after) = rest.split_once("=\"").unwrap();
        let mut value = String::new();
        let mut letters = after.char_indices();
        let end = loop {
            match letters.next().unwrap() {
                (_, '\\') => value.push(letters.next().unwrap().1),
                (at, '"') => break at,
                (_, letter) => value.push(letter),
            }
        };
        assert!(labels.insert(key.into(), value).is_none(), "{line}");
        match after[end + 1..].strip_prefix(',') {
            Some(more) => rest = more,
            None => {
                let value = after[end + 1..].strip_prefix("} ").unwrap();
                return (name.into(), labels, value.parse().unwrap());
            }
        }
    }
}

#[test]
fn the_text_is_openmetrics_and_says_how_it_stands() {
    let parsed = Parsed::of(&full().text(&now()));
    let web = [("domain", "web \"1\"\\")];
    for (name, labels, value) in [
        ("remus_build_info", &[("version", env!("CARGO_PKG_VERSION"))][..], 1.0),
        ("remus_protected", &[("domain", "web \"1\"\\"), ("role", "primary"), ("peer", "hostb")], 1.0),
        ("remus_protected", &[("domain", "db"), ("role", "backup")], 1.0),
        ("remus_state", &[("domain", "db"), ("state", "protected")], 1.0),
        ("remus_may_run", &[("domain", "db"), ("who", "here")], 1.0),
        ("remus_generation", &web, 7.0),
        ("remus_acked_epoch", &web, 812.0),
        ("remus_acked_age_seconds", &web, 0.184),
        ("remus_stale_seconds", &web, 0.2),
        ("remus_held_packets", &web, 12.0),
        ("remus_held_bytes", &web, 1800.0),
        ("remus_dropped_packets_total", &web, 3.0),
        ("remus_sent_pages_total", &web, 100.0),
        ("remus_sent_bytes_total", &web, 409_600.0),
        ("remus_wanted", &[("domain", "db")], 1.0),
        ("remus_witness_up", &[("witness", "http://w:2379")], 1.0),
        ("remus_witness_up", &[("witness", "script:/w")], 0.0),
        ("remus_epochs_total", &web, 1.0),
        ("remus_epoch_pause_seconds_sum", &web, 0.003),
        ("remus_epoch_pause_seconds_count", &web, 1.0),
        ("remus_epoch_ack_seconds_sum", &web, 0.04),
        ("remus_epoch_output_held_seconds_sum", &web, 0.043),
        ("remus_epoch_bytes_sum", &web, 5000.0),
        ("remus_events_total", &[("kind", "unprotected")], 1.0),
        ("remus_events_total", &[("kind", "conflict")], 0.0),
    ] {
        assert_eq!(parsed.value(name, labels), Some(value), "{name} {labels:?}");
    }
    assert_eq!(parsed.value("remus_witness_up", &[("witness", "x")]), None, "not known yet");
    assert_eq!(parsed.value("remus_held_packets", &[("domain", "db")]), None, "a backup holds nothing");
    let least = parsed.value("remus_epoch_pause_seconds_bucket", &[("le", "0.0032")]);
    assert_eq!(least, Some(1.0));
    assert_eq!(parsed.value("remus_epoch_pause_seconds_bucket", &[("le", "0.0016")]), Some(0.0));
}

#[test]
fn what_is_gone_is_not_told_and_what_flows_is_counted_once() {
    let metrics = full();
    let _ = metrics.text(&now());
    metrics.epoch("web \"1\"\\", &report());
    let again = Parsed::of(&metrics.text(&now()));
    assert_eq!(again.value("remus_sent_bytes_total", &[]), Some(409_600.0), "asking twice does not double it");
    assert_eq!(again.value("remus_epochs_total", &[]), Some(2.0));
    let gone = Parsed::of(&metrics.text(&Now::default()));
    let left: BTreeSet<_> = gone.samples.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(left, BTreeSet::from(["remus_build_info", "remus_events_total"]));
}

/// Every name that begins with `remus_` in a text.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !word(c)).filter(|name| name.starts_with("remus_")).map(str::to_owned).collect()
}

#[test]
fn rules_dashboard_and_manual_name_what_there_is() {
    let parsed = Parsed::of(&full().text(&now()));
    for (file, text) in [
        ("rules", include_str!("../../../scripts/monitoring/remus.rules.yml")),
        ("dashboard", include_str!("../../../scripts/monitoring/remus.dashboard.json")),
        ("manual", include_str!("../../../docs/monitoring.md")),
    ] {
        let used = names(text);
        assert!(!used.is_empty(), "{file}");
        for name in used {
            let there = parsed.family(&name).is_some() || parsed.kinds.contains_key(&name);
            assert!(there, "{file} names {name}, which there is not");
        }
    }
    let manual = names(include_str!("../../../docs/monitoring.md"));
    for family in parsed.kinds.keys() {
        assert!(manual.iter().any(|name| name.starts_with(family.as_str())), "docs/monitoring.md leaves out {family}");
    }
    serde_json::from_str::<serde_json::Value>(include_str!("../../../scripts/monitoring/remus.dashboard.json"))
        .unwrap();
}

#[test]
fn every_alert_and_every_event_has_a_runbook() {
    let runbooks = include_str!("../../../docs/runbooks.md");
    let rules = include_str!("../../../scripts/monitoring/remus.rules.yml");
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 10, "{alerts:?}");
    for alert in alerts {
        assert!(runbooks.contains(&format!("### {alert}\n")), "no runbook for {alert}");
        let anchor = format!("docs/runbooks.md#{}", alert.to_lowercase());
        assert!(rules.contains(&format!("{anchor}\"")), "{alert} does not lead to it");
    }
    let (alarms, others) = runbooks.split_once("## Other events").unwrap();
    for kind in EventKind::ALL {
        let row = format!("`{}`", kind.name());
        let place = if kind.is_alarm() { alarms } else { others };
        assert!(place.contains(&row), "{row} is missing, or in the wrong table");
    }
}

async fn ask(question: &[u8]) -> String {
    let listener = server::listen(([127, 0, 0, 1], 0).into()).unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(server::serve(listener, || async { "figures\n# EOF\n".to_owned() }));
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(question).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    task.abort();
    answer
}

#[tokio::test]
async fn the_server_answers_get_and_nothing_else() {
    let answer = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains(server::CONTENT_TYPE), "{answer}");
    assert!(answer.contains("Content-Length: 14\r\n") && answer.ends_with("\r\n\r\nfigures\n# EOF\n"), "{answer}");
    assert!(ask(b"GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404 "));
    assert!(ask(b"POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
    assert!(ask(b"\x16\x03\x01\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
}
