//! Which hotplug script a domain's configuration names, and giving it the gate in front.

use std::path::Path;

use serde_json::Value;

/// Where Xen's scripts are; what a configuration names without a folder is there (libxl's `XEN_SCRIPT_DIR`).
pub const SCRIPTS: &str = "/etc/xen/scripts";
/// The script's name; with `-NAME` it goes on as `vif-NAME`.
pub const GATE: &str = "vif-remus";
/// What libxl takes when a configuration names none.
const DEFAULT: &str = "vif-bridge";

/// Whether this is the gate, or has it in front.
#[must_use]
pub fn is_gate(script: &str) -> bool {
    let name = script.rsplit('/').next().unwrap_or(script);
    name == GATE || name.strip_prefix(GATE).is_some_and(|rest| rest.starts_with('-'))
}

/// The name of the script that seals and then does what `script` does. `None` for one that no such name exists for: it lies outside
/// Xen's folder, or is not named `vif-...`.
#[must_use]
pub fn gated(script: &str) -> Option<String> {
    let name = match script.rsplit_once('/') {
        Some((SCRIPTS, name)) => name,
        Some(_) => return None,
        None => script,
    };
    if is_gate(name) {
        return Some(name.to_owned());
    }
    name.strip_prefix("vif-").filter(|rest| !rest.is_empty()).map(|rest| format!("{GATE}-{rest}"))
}

/// The scripts of the vifs in libxl's JSON that are not gated, by device id and script.
#[must_use]
pub fn ungated(config: &str) -> Vec<(u64, String)> {
    let value: Value = serde_json::from_str(config).unwrap_or_default();
    nics(&value).iter().map(|nic| (devid(nic), script(nic))).filter(|(_, script)| !is_gate(script)).collect()
}

/// libxl's JSON with the gate in front of every vif's script, as far as `there` says that such a script exists (given its whole path).
/// Whatever cannot be gated stays as it is.
#[must_use]
pub fn with_gate(config: &str, there: impl Fn(&Path) -> bool) -> String {
    let Ok(mut value) = serde_json::from_str::<Value>(config) else { return config.to_owned() };
    let mut changed = false;
    if let Some(nics) = value.get_mut("nics").and_then(Value::as_array_mut) {
        for nic in nics {
            let path = gated(&script(nic)).map(|name| format!("{SCRIPTS}/{name}"));
            if let Some(path) = path.filter(|path| there(Path::new(path)))
                && let Some(nic) = nic.as_object_mut()
            {
                nic.insert("script".into(), Value::String(path));
                changed = true;
            }
        }
    }
    // Untouched text for a domain without vifs: libxl's own order and numbers.
    if changed { value.to_string() } else { config.to_owned() }
}

fn nics(value: &Value) -> &[Value] {
    value.get("nics").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn devid(nic: &Value) -> u64 {
    nic.get("devid").and_then(Value::as_u64).unwrap_or_default()
}

fn script(nic: &Value) -> String {
    nic.get("script").and_then(Value::as_str).filter(|script| !script.is_empty()).unwrap_or(DEFAULT).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(gated("vif-bridge").as_deref(), Some("vif-remus-bridge"));
        assert_eq!(gated("/etc/xen/scripts/vif-openvswitch").as_deref(), Some("vif-remus-openvswitch"));
        assert_eq!(gated("/etc/xen/scripts/vif-remus").as_deref(), Some("vif-remus"));
        assert_eq!(gated("/opt/vif-bridge"), None);
        assert_eq!(gated("my-script"), None);
        assert!(is_gate("/etc/xen/scripts/vif-remus-nat") && !is_gate("vif-remusless"));
    }

    #[test]
    fn every_vif_gets_the_gate_that_exists() {
        let config = r#"{"c_info":{"name":"g"},"nics":[{"devid":0},{"devid":1,"script":"/etc/xen/scripts/vif-nat"},
            {"devid":2,"script":"/opt/mine"},{"devid":3,"script":"vif-remus"}]}"#;
        let all = with_gate(config, |_| true);
        let value: Value = serde_json::from_str(&all).unwrap();
        let scripts: Vec<_> = (0..4).map(|i| value["nics"][i]["script"].as_str().unwrap_or_default()).collect();
        let dir = "/etc/xen/scripts";
        assert_eq!(
            scripts,
            [
                &format!("{dir}/vif-remus-bridge"),
                &format!("{dir}/vif-remus-nat"),
                "/opt/mine",
                &format!("{dir}/vif-remus")
            ]
        );
        assert_eq!(value["c_info"]["name"], "g");
        assert_eq!(ungated(&all), [(2, "/opt/mine".to_owned())]);
        assert_eq!(with_gate(config, |_| false), config);
        assert_eq!(with_gate("{}", |_| true), "{}");
        assert_eq!(with_gate("oops", |_| true), "oops");
    }

    #[test]
    fn numbers_survive() {
        let config = r#"{"nics":[{"mac":"00:16:3e:00:00:01"}],"b_info":{"max_memkb":18446744073709551615,"x":1.5}}"#;
        let value: Value = serde_json::from_str(&with_gate(config, |_| true)).unwrap();
        assert_eq!(value["b_info"]["max_memkb"].as_u64(), Some(u64::MAX));
    }
}
