//! Files as people write them, also wrongly.

use std::path::Path;

use super::change::settings;
use super::*;

const EXAMPLE: &str = include_str!("../../../scripts/remusd.toml");

/// The example with everything that is commented out let in.
fn all_of_the_example() -> Config {
    let active: Vec<_> = EXAMPLE.lines().map(|line| line.strip_prefix("#= ").unwrap_or(line)).collect();
    Config::parse(&active.join("\n")).unwrap()
}

#[test]
fn defaults_and_settings() {
    assert_eq!(Loaded::read(Path::new("/nonexistent/remusd.toml")).unwrap().config, Config::default());
    let config = Config::parse("[listen]\naddress = \"10.0.0.1\"\nport = 7000\n[control]\ngroup = \"adm\"\n").unwrap();
    assert_eq!(config.listen, Listen { address: [10, 0, 0, 1].into(), port: 7000 });
    assert_eq!(config.control.group.as_deref(), Some("adm"));
    for (text, place) in [("9365", "127.0.0.1:9365"), ("10.0.0.1:9365", "10.0.0.1:9365"), ("[::1]:9365", "[::1]:9365")]
    {
        let config = Config::parse(&format!("[metrics]\nlisten = \"{text}\"\n")).unwrap();
        assert_eq!(config.metrics.listen, Some(place.parse().unwrap()));
    }
    let config = Config::parse("[backup]\nlan_check = \"ping -c1 10.0.0.1\"\n").unwrap();
    assert_eq!(config.backup.lan_check.as_deref(), Some("ping -c1 10.0.0.1"));
    let config = Config::parse("[events]\nhook = \"/x\"\nhook_kinds = [\"unprotected\", \"holding\"]\n").unwrap();
    let kinds = Some(vec![crate::ops::EventKind::Unprotected, crate::ops::EventKind::Holding]);
    assert_eq!(config.events, Events { hook: Some("/x".into()), hook_kinds: kinds, hook_timeout_ms: 10_000 });
    assert_eq!(Config::parse("[listen]\nport = 7000\n").unwrap().listen.address, Listen::default().address);
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_what_was_meant() {
    for (text, place, said) in [
        ("[listen]\nprot = 1\n", (2, 1), "unknown key `prot`, expected `address` or `port`; did you mean `port`?"),
        ("# note\n\n[lissen]\n", (3, 2), "did you mean `listen`?"),
        ("[listen]\n  colour = 1\n", (2, 3), "expected `address` or `port`"),
        ("[listen]\nport = 0\n", (2, 8), "port is 0"),
        ("[listen]\nport = 70000\n", (2, 8), "70000"),
        ("[log]\nfilter = \"a=b=c\"\n", (2, 10), "no log filter"),
        ("[metrics]\nlisten = \"localhost\"\n", (2, 10), "give ADDRESS:PORT"),
        ("[metrics]\nlisten = \"80\"\n", (2, 10), "from 1024 on"),
        ("[events]\nhook = \"notify\"\n", (2, 8), "give the whole path"),
        ("[events]\nhok = \"/x\"\n", (2, 1), "did you mean `hook`?"),
        ("[events]\nhook_kinds = [\"unprotectd\"]\n", (2, 15), "did you mean `unprotected`?"),
        ("[events]\nhook_timeout_ms = 5\n", (2, 19), "100 to 600000"),
        ("listen = 3", (1, 10), "expected"),
        ("[listen\n", (1, 8), ""),
        ("[listen]\nport = 7000\nport = 7001\n", (3, 1), "duplicate key"),
    ] {
        let problem = Config::parse(text).unwrap_err();
        assert!(problem.to_string().contains(said), "{text:?}: {problem}");
        assert_eq!(problem.place, Some(place), "{text:?}: {problem}");
    }
    let problem = Config::parse("[listen]\ncolour = 1\n").unwrap_err();
    assert_eq!(problem.meant, None, "nothing is like it");
}

#[test]
fn later_drop_ins_win_and_every_wrong_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("remusd.toml");
    let folder = drop_ins(&path);
    std::fs::create_dir(&folder).unwrap();
    let put = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    std::fs::write(&path, "[listen]\naddress = \"10.0.0.1\"\nport = 7001\n[control]\ngroup = \"a\"\n").unwrap();
    put("20-site.toml", "[listen]\nport = 7002\n");
    put("10-site.toml", "[listen]\nport = 7003\n[control]\nadmins = \"b\"\n");
    put("30-no.toml.dpkg-old", "nonsense");
    put(".#40.toml", "nonsense");

    let loaded = Loaded::read(&path).unwrap();
    assert_eq!(loaded.config.listen, Listen { address: [10, 0, 0, 1].into(), port: 7002 });
    assert_eq!(loaded.config.control, Control { group: Some("a".into()), admins: Some("b".into()) });
    let names: Vec<_> = loaded.files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["remusd.toml", "10-site.toml", "20-site.toml"]);

    put("10-site.toml", "[listen]\nprot = 7003\n");
    put("50-last.toml", "[control]\ngrupo = 1\n");
    let errors: Vec<_> = Loaded::read(&path).unwrap_err().iter().map(ToString::to_string).collect();
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors[0].contains("10-site.toml: line 2, column 1: unknown key `prot`"), "{errors:?}");
    assert!(errors[1].contains("50-last.toml: line 2") && errors[1].ends_with("did you mean `group`?"), "{errors:?}");
}

#[test]
fn the_default_file_shows_every_setting_with_its_default() {
    assert_eq!(Config::parse(EXAMPLE).unwrap(), Config::default(), "what is commented out is not set");
    let (shown, default) = (settings(&all_of_the_example()), settings(&Config::default()));
    for (key, value) in &default {
        assert_eq!(shown.get(key), Some(value), "{key}: the example shows the default");
    }
    // What has no default is shown too: the struct's source names the fields, and a field without an entry is found here.
    let source = concat!(include_str!("mod.rs"), include_str!("events.rs"));
    let fields =
        source.lines().filter_map(|line| line.strip_prefix("    pub ")?.split_once(": ")).map(|(name, _)| name);
    let fields = fields.filter(|name| !name.contains(' '));
    let mut count = 0;
    for field in fields {
        let named = EXAMPLE.contains(&format!("#= {field} = ")) || EXAMPLE.contains(&format!("[{field}]"));
        assert!(named, "{field} is missing in scripts/remusd.toml");
        count += 1;
    }
    assert!(count >= 13, "the fields are found in the source: {count}");
    assert_eq!(Config::parse(&toml::to_string(&all_of_the_example()).unwrap()).unwrap(), all_of_the_example());
}

#[test]
fn changes_are_told_with_when_they_hold() {
    let old = Config::default();
    assert_eq!(changes(&old, &old), []);
    let new = Config::parse("[listen]\nport = 7001\n[control]\ngroup = \"g\"\n[log]\nfilter = \"debug\"\n").unwrap();
    let told = changes(&old, &new);
    let keys: Vec<_> = told.iter().map(|c| (c.key.as_str(), c.after_restart.is_some())).collect();
    assert_eq!(keys, [("control.group", false), ("listen.port", true), ("log.filter", false)]);
    assert_eq!(told[0].to_string(), "control.group: not set -> \"g\"");
    assert!(told[1].to_string().starts_with("listen.port: 7368 -> 7001 (NOT YET"), "{}", told[1]);
}
