//! `remusd check-config`: what the daemon would make of the files.

use std::path::Path;

use super::Loaded;
use crate::api::access;
use crate::policy;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How it stands, a line each: files that were read, settings that hold, policies.
    pub stands: Vec<String>,
    /// What is wrong, a line each, each with the file and where it can be said the line.
    pub wrong: Vec<String>,
}

/// Reads the configuration and the policies as the daemon does. Changes nothing and needs no daemon; asks the user database for groups.
#[must_use]
pub fn check(path: &Path, policies: &Path) -> Report {
    let mut report = Report::default();
    match Loaded::read(path) {
        Ok(Loaded { config, files }) => {
            if files.is_empty() {
                report.stands.push(format!("{}: not there; everything is default", path.display()));
            }
            report.stands.extend(files.iter().map(|file| format!("{}: ok", file.display())));
            for (key, group) in [("control.group", &config.control.group), ("control.admins", &config.control.admins)] {
                if let Some(Err(text)) = group.as_deref().map(access::group) {
                    report.wrong.push(format!("{key}: {text}"));
                }
            }
            report.wrong.extend(config.events.look().err());
            report
                .stands
                .extend(super::change::settings(&config).iter().map(|(key, value)| format!("  {key} = {value}")));
        }
        Err(errors) => report.wrong.extend(errors.iter().map(ToString::to_string)),
    }
    let (found, errors) = policy::read(policies);
    for (name, policy) in &found {
        report.stands.push(format!(
            "{}: {name} is to be protected towards {}",
            policy::path(policies, name).display(),
            policy.label()
        ));
    }
    report.wrong.extend(errors.iter().map(ToString::to_string));
    report
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (path, policies) = (dir.path().join("remusd.toml"), dir.path().join("domains"));
        let report = check(&path, &policies);
        assert!(report.wrong.is_empty() && report.stands[0].contains("everything is default"), "{report:?}");
        assert!(report.stands.contains(&"  listen.port = 7368".to_owned()), "{report:?}");

        std::fs::create_dir(&policies).unwrap();
        std::fs::write(policies.join("web.toml"), "[target]\nhost = \"hostb\"\n").unwrap();
        std::fs::write(policies.join("db.toml"), "[target]\nhots = \"hostb\"\n").unwrap();
        let hook = dir.path().join("hook");
        let config = format!("[control]\nadmins = \"no-such-group\"\n[events]\nhook = \"{}\"\n", hook.display());
        std::fs::write(&path, config).unwrap();
        let wrong = || check(&path, &policies).wrong[1].clone();
        assert!(wrong().starts_with("events.hook: ") && wrong().contains("No such file"), "{}", wrong());
        std::fs::create_dir(&hook).unwrap();
        assert!(wrong().ends_with("is not a file"), "{}", wrong());
        std::fs::remove_dir(&hook).unwrap();
        std::fs::write(&hook, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(wrong().contains("chmod +x"), "{}", wrong());
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
        let report = check(&path, &policies);
        assert!(report.stands.iter().any(|line| line.ends_with("web is to be protected towards hostb")), "{report:?}");
        assert_eq!(report.wrong.len(), 2, "{report:?}");
        assert!(report.wrong[0].starts_with("control.admins: there is no group"), "{report:?}");
        assert!(report.wrong[1].contains("db.toml: line 2") && report.wrong[1].contains("`host`"), "{report:?}");
    }
}
